/* Rows in memory: read and written in granules of 16 aligned bytes, wherever a row begins. Granules at its ends may
   belong to other rows too, and are accessed number by number. */
static constexpr int V = 16 / sizeof(number); /* numbers in a granule */

union Granule {
    bits16 bits;
    number x[V];
    FC_DEVICE Granule() {}
};

/* A row of the output: contiguous or strided, and in granules if it is aligned as the logits are. */
struct OutRow {
    char* first;
    int64 class_stride;
    bool is_aligned;

    FC_DEVICE OutRow(char* to, int64 stride, const char* logits)
        : first(to), class_stride(stride),
          is_aligned(
              stride == sizeof(number) &&
              (reinterpret_cast<unsigned long long>(to) - reinterpret_cast<unsigned long long>(logits)) % 16 == 0) {}
    FC_DEVICE number& at(int k) const { return *reinterpret_cast<number*>(first + k * class_stride); }
};

/* A row, or several without gaps, in granules; the first of these begins at or before the row. */
struct Span {
    char* base;    /* of granule 0, aligned */
    int before;    /* numbers of it that are before the row */
    int n_classes;
    int n_granules;

    FC_DEVICE Span(char* first, int64 n) {
        const int misplaced = (int)(reinterpret_cast<unsigned long long>(first) % 16);
        base = first - misplaced;
        before = misplaced / (int)sizeof(number);
        n_classes = (int)n;
        n_granules = (int)((before + n + V - 1) / V);
    }
    FC_DEVICE int first_class(int g) const { return g * V - before; }
    FC_DEVICE bool is_whole(int g) const { return first_class(g) >= 0 && first_class(g) + V <= n_classes; }
    FC_DEVICE bool has(int k) const { return (unsigned)k < (unsigned)n_classes; }

    FC_DEVICE void load_ends(int g, Granule& to) const {
        FC_UNROLL
        for (int i = 0; i < V; i++)
            if (has(first_class(g) + i)) to.x[i] = reinterpret_cast<const number*>(base + 16 * (int64)g)[i];
    }
    FC_DEVICE void load(int g, Granule& to) const {
        if (is_whole(g))
            to.bits = *reinterpret_cast<const bits16*>(base + 16 * (int64)g);
        else
            load_ends(g, to);
    }
    template <class F>
    FC_DEVICE void for_each(int g, const Granule& from, F f) const {
        const int k = first_class(g);
        if (is_whole(g)) {
            FC_UNROLL
            for (int i = 0; i < V; i++) f(k + i, widen(from.x[i]));
        } else {
            FC_UNROLL
            for (int i = 0; i < V; i++)
                if (has(k + i)) f(k + i, widen(from.x[i]));
        }
    }
    /* Write f of each number of a granule to the output. No array is indexed by anything but constants: it would not
       stay in registers. */
    template <class F>
    FC_DEVICE void put(int g, const Granule& from, const OutRow& out, F f) const {
        const int k = first_class(g);
        if (out.is_aligned && is_whole(g)) {
            Granule y;
            FC_UNROLL
            for (int i = 0; i < V; i++) narrow(f(k + i, widen(from.x[i])), y.x[i]);
            *reinterpret_cast<bits16*>(&out.at(k)) = y.bits;
        } else {
            FC_UNROLL
            for (int i = 0; i < V; i++)
                if (has(k + i)) narrow(f(k + i, widen(from.x[i])), out.at(k + i));
        }
    }
    /* Write a granule to the output. */
    FC_DEVICE void store(int g, const Granule& y, const OutRow& out) const {
        const int k = first_class(g);
        if (out.is_aligned && is_whole(g)) {
            *reinterpret_cast<bits16*>(&out.at(k)) = y.bits;
        } else {
            FC_UNROLL
            for (int i = 0; i < V; i++)
                if (has(k + i)) out.at(k + i) = y.x[i];
        }
    }
};
