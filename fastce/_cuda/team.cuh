/* The threads that share a row, and their reductions: of the maximum, of sums and of the first maximum's class. Their
   order is fixed, so that a row always has the same bits.

   A team is a part of a warp, a block of WARPS warps, or CLUSTER such blocks. Each reduction has slots of its own in
   shared memory, so that one barrier per reduction is enough. */

template <int LANES, int WARPS, int CLUSTER>
struct Team {
    static constexpr int REDUCTIONS = ALL_SUMS + 2; /* the maximum, the sums, the first maximum's class */
    static constexpr int BYTES = (WARPS + CLUSTER) * REDUCTIONS * 8;

    FC_DEVICE unsigned rank() const { return WARPS > 1 ? thread_rank() : thread_rank() % LANES; }
    FC_DEVICE bool is_first() const { return rank() == 0 && (CLUSTER == 1 || cluster_rank() == 0); }

    /* No thread writes before all have read. Reductions see to that, except within a warp. */
    FC_DEVICE void sync() {
        if (WARPS == 1 && CLUSTER == 1) sync_warp();
    }
    FC_DEVICE real max(real x) {
        reduce(0, 1, &x, [](real a, real b) { return larger(a, b); });
        return x;
    }
    FC_DEVICE void sum(real* x) {
        reduce(1, ALL_SUMS, x, [](real a, real b) { return a + b; });
    }
    FC_DEVICE int min(int x) {
        double y = x; /* exact */
        reduce(ALL_SUMS + 1, 1, &y, [](double a, double b) { return a < b ? a : b; });
        return (int)y;
    }

  private:
    template <class V>
    FC_DEVICE static V* slots(int slot) {
        return reinterpret_cast<V*>(shared_memory() + slot * (WARPS + CLUSTER) * 8);
    }
    /* Replace each of n values by the reduction with `join` of those of all threads. */
    template <class V, class F>
    FC_DEVICE void reduce(int slot, int n, V* x, F join) {
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
            if (lane == 0 && !(n == ALL_SUMS && !is_summed(k))) slots<V>(slot + k)[warp] = x[k];
        sync_block();
        FC_UNROLL
        for (int k = 0; k < n; k++) {
            if (n == ALL_SUMS && !is_summed(k)) continue;
            x[k] = slots<V>(slot + k)[lane % WARPS];
            FC_UNROLL
            for (int mask = WARPS / 2; mask > 0; mask /= 2) x[k] = join(x[k], shuffle_xor(x[k], mask));
        }
        if (CLUSTER == 1) return;
        FC_UNROLL
        for (int k = 0; k < n; k++)
            if (thread_rank() < CLUSTER && !(n == ALL_SUMS && !is_summed(k)))
                store_remote(slots<V>(slot + k) + 8 * WARPS / (int)sizeof(V) + cluster_rank(), x[k], thread_rank());
        sync_cluster();
        FC_UNROLL
        for (int k = 0; k < n; k++) {
            if (n == ALL_SUMS && !is_summed(k)) continue;
            x[k] = (slots<V>(slot + k) + 8 * WARPS / (int)sizeof(V))[lane % CLUSTER];
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
