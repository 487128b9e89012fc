/* The threads that share a row, and how they agree on a maximum and on sums: always in the same order, so that a row
   has the same bits whenever it is done.

   A team is part of a warp, a block of WARPS warps, or CLUSTER such blocks. What they exchange has a place of its own for
   each of the three questions, so that one barrier is enough for each. */

template <int LANES, int WARPS, int CLUSTER>
struct Team {
    static constexpr int QUESTIONS = ALL_SUMS + 2; /* the maximum, the sums, the first of the maxima */
    static constexpr int BYTES = (WARPS + CLUSTER) * QUESTIONS * 8;

    FC_DEVICE unsigned rank() const { return WARPS > 1 ? thread_rank() : thread_rank() % LANES; }
    FC_DEVICE bool is_first() const { return rank() == 0 && (CLUSTER == 1 || cluster_rank() == 0); }

    /* What the team has read is read before any of it writes: questions see to that, except within a warp. */
    FC_DEVICE void sync() {
        if (WARPS == 1 && CLUSTER == 1) sync_warp();
    }
    FC_DEVICE real max(real x) {
        exchange(0, 1, &x, [](real a, real b) { return larger(a, b); });
        return x;
    }
    FC_DEVICE void sum(real* x) {
        exchange(1, ALL_SUMS, x, [](real a, real b) { return a + b; });
    }
    FC_DEVICE int min(int x) {
        double y = x; /* exact */
        exchange(ALL_SUMS + 1, 1, &y, [](double a, double b) { return a < b ? a : b; });
        return (int)y;
    }

  private:
    template <class V>
    FC_DEVICE static V* slots(int question) {
        return reinterpret_cast<V*>(shared_memory() + question * (WARPS + CLUSTER) * 8);
    }
    /* Replace n values by what `join` makes of those of all threads. */
    template <class V, class F>
    FC_DEVICE void exchange(int question, int n, V* x, F join) {
        FC_UNROLL
        for (int k = 0; k < n; k++) {
            if (n == ALL_SUMS && !is_summed(k)) continue;
            FC_UNROLL
            for (int mask = LANES / 2; mask > 0; mask /= 2) x[k] = join(x[k], shuffle_xor(x[k], mask));
        }
        if (WARPS == 1 && CLUSTER == 1) return;
        const unsigned warp = thread_rank() / 32, lane = thread_rank() % 32;
        FC_UNROLL
        for (int k = 0; k < n; k++)
            if (lane == 0 && !(n == ALL_SUMS && !is_summed(k))) slots<V>(question + k)[warp] = x[k];
        sync_block();
        FC_UNROLL
        for (int k = 0; k < n; k++) {
            if (n == ALL_SUMS && !is_summed(k)) continue;
            x[k] = slots<V>(question + k)[lane % WARPS];
            FC_UNROLL
            for (int mask = WARPS / 2; mask > 0; mask /= 2) x[k] = join(x[k], shuffle_xor(x[k], mask));
        }
        if (CLUSTER == 1) return;
        FC_UNROLL
        for (int k = 0; k < n; k++)
            if (thread_rank() < CLUSTER && !(n == ALL_SUMS && !is_summed(k)))
                store_remote(slots<V>(question + k) + 8 * WARPS / (int)sizeof(V) + cluster_rank(), x[k], thread_rank());
        sync_cluster();
        FC_UNROLL
        for (int k = 0; k < n; k++) {
            if (n == ALL_SUMS && !is_summed(k)) continue;
            x[k] = (slots<V>(question + k) + 8 * WARPS / (int)sizeof(V))[lane % CLUSTER];
            FC_UNROLL
            for (int mask = CLUSTER / 2; mask > 0; mask /= 2) x[k] = join(x[k], shuffle_xor(x[k], mask));
        }
    }
};

template <>
struct Team<1, 1, 1> {
    static constexpr int BYTES = 0;
    FC_DEVICE bool is_first() const { return true; }
    FC_DEVICE void sync() {}
    FC_DEVICE real max(real x) { return x; }
    FC_DEVICE void sum(real*) {}
    FC_DEVICE int min(int x) { return x; }
};
