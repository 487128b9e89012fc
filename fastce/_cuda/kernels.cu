/* The kernels: one for each way of holding a row. Which of them this is, and for what, macros say that `_program.py`
   writes in front:

   FC_NAME             the kernel's name
   FC_FAMILY           TILE, WARP, BLOCK, STREAM, COLUMN or TOTAL, see below
   FC_THREADS          of a block; FC_PER_SM of these blocks have to fit on a multiprocessor
   FC_LANES            (WARP) threads that share a row
   FC_GRANULES         (WARP) 16 bytes, so many of which a thread holds
   FC_CLUSTER          (BLOCK) blocks that share a row
   FC_CLASSES          (COLUMN) how many there are if they fit into registers, else 0
   FC_T, FC_DOUBLE     the logits' type, and whether it is double
   FC_PROB             the type of class probabilities
   FC_TARGET           the target: 0 an index, 1 an index with label smoothing, 2 probabilities
   FC_OUT              what is written beside the losses: 0 nothing, 1 the gradient, 2 the softmax, 3 its logarithm
   FC_CAP, FC_STATS, FC_NORMALIZED    1 for a softcap, for statistics, for log-probabilities instead of logits
   FC_TASK_BYTES       sizeof(Task)

   Design
   ------
   1. A row is read from memory once and written once. TILE, WARP and BLOCK hold it on chip in between; STREAM and COLUMN,
      for rows that fit nowhere, read it once more.
   2. Nothing of a row is written before all of it was read: the exchange of the maximum or of the sums is the barrier
      between. So the gradient may take the logits' place.
   3. Offsets have 64 bits; a class has 32.
   4. The logits alone decide how a row is held and summed. Wherever its results go, they have the same bits.
*/
#ifdef FC_HOST
#include "host.hpp"
#else
#include "device.cuh"
#endif
#include "task.cuh"
#include "span.cuh"
#include "row.cuh"
#include "team.cuh"

#define TILE 0
#define WARP 1
#define BLOCK 2
#define STREAM 3
#define COLUMN 4
#define TOTAL 5

FC_DEVICE char* logits_of(const Task& task, int64 row) {
    return task.logits.data + row_offset(task, task.logits.row_strides, row);
}
FC_DEVICE char* out_of(const Task& task, int64 row) {
    return FC_OUT == 0 ? nullptr : task.out.data + row_offset(task, task.out.row_strides, row);
}
FC_DEVICE Place place_of(const Task& task, int64 row, const char* logits) {
    return Place(out_of(task, row), task.out.class_stride, logits);
}

#if FC_FAMILY == TILE
/* Few classes: a block copies as many rows as it has threads through shared memory; each thread does one of them there.
   Rows without gaps are one span. Others are copied number by number, neighbours by neighbours. */

struct TileHome {
    static constexpr bool ON_CHIP = true;
    number* x;
    int n_classes;
    bool is_read;

    template <class F>
    FC_DEVICE void walk(F f) {
        if (!is_read) return;
        for (int k = 0; k < n_classes; k++) f(k, widen(x[k]));
    }
    template <class F>
    FC_DEVICE void write(F f) {
        for (int k = 0; k < n_classes; k++) narrow(f(k, widen(x[k])), x[k]);
    }
};

/* Call f(place in the tile, address in the matrix) for each number of the rows of this block. */
template <class F>
FC_DEVICE void each_apart(const Task& task, const Matrix& matrix, int64 start, int n, F f) {
    const int n_classes = (int)task.n_classes, rank = (int)thread_rank();
    int64* places = reinterpret_cast<int64*>(
            shared_memory() + ((int64)(sizeof(number) * FC_THREADS) * n_classes + 15) / 16 * 16 + 16);
    if (rank < n) places[rank] = row_offset(task, matrix.row_strides, start + rank);
    sync_block();
    for (int row = rank / n_classes, k = rank % n_classes; row < n;) {
        f(row * n_classes + k, reinterpret_cast<number*>(matrix.data + places[row] + k * matrix.class_stride));
        row += FC_THREADS / n_classes;
        k += FC_THREADS % n_classes;
        if (k >= n_classes) k -= n_classes, row++;
    }
}

FC_KERNEL(FC_THREADS, FC_PER_SM) FC_NAME(Task task) {
    Granule* tile = reinterpret_cast<Granule*>(shared_memory());
    const int64 start = (int64)block_rank() * FC_THREADS;
    const int n = (int)(task.n_rows - start < FC_THREADS ? task.n_rows - start : FC_THREADS);
    const Span span(task.logits.is_dense ? logits_of(task, start) : nullptr, n * task.n_classes);
    number* const first = reinterpret_cast<number*>(tile) + span.before;
    if (task.logits.is_dense) {
        for (int g = (int)thread_rank(); g < span.n_granules; g += FC_THREADS) {
            if (span.is_whole(g))
                copy_16(tile + g, span.base + 16 * (int64)g);
            else
                span.load_ends(g, tile[g]);
        }
        wait_for_copies();
    } else {
        each_apart(task, task.logits, start, n, [&](int i, const number* x) { first[i] = *x; });
    }
    sync_block();
    if ((int)thread_rank() < n) {
        const int64 row = start + thread_rank();
        const Row r = read_row(task, row);
        number* x = first + thread_rank() * task.n_classes;
        TileHome home = {x, (int)task.n_classes, r.weight != 0};
        Team<1, 1, 1> team;
        do_row(task, row, r, team, home, r.y < 0 ? (real)0 : widen(x[r.y]));
    }
    if (FC_OUT == 0) return;
    sync_block();
    if (task.out.is_dense) {
        const Place out(out_of(task, start), sizeof(number), span.base + sizeof(number) * span.before);
        for (int g = (int)thread_rank(); g < span.n_granules; g += FC_THREADS) span.store(g, tile[g], out);
    } else {
        each_apart(task, task.out, start, n, [&](int i, number* y) { *y = first[i]; });
    }
}

#elif FC_FAMILY == WARP
/* Up to a few thousand classes: part of a warp, or a whole one, holds a row in registers. */

struct RegisterHome {
    static constexpr bool ON_CHIP = true;
    Span span;
    Granule held[FC_GRANULES];
    Place out;
    bool is_read, is_row;

    FC_DEVICE RegisterHome(char* x, int64 n, const Place& to, bool read, bool row)
        : span(x, n), out(to), is_read(read && row), is_row(row) {
        FC_UNROLL
        for (int i = 0; i < FC_GRANULES; i++)
            if (is_read && granule(i) < span.n_granules) span.load(granule(i), held[i]);
    }
    FC_DEVICE static int granule(int i) { return (int)(thread_rank() % FC_LANES) + i * FC_LANES; }
    template <class F>
    FC_DEVICE void walk(F f) {
        FC_UNROLL
        for (int i = 0; i < FC_GRANULES; i++)
            if (is_read && granule(i) < span.n_granules) span.each(granule(i), held[i], f);
    }
    template <class F>
    FC_DEVICE void write(F f) {
        FC_UNROLL
        for (int i = 0; i < FC_GRANULES; i++)
            if (is_row && granule(i) < span.n_granules) span.put(granule(i), held[i], out, f);
    }
};

FC_KERNEL(FC_THREADS, FC_PER_SM) FC_NAME(Task task) {
    /* Teams without a row of their own go through the last one, without reading or writing it: warps stay together. */
    const int64 place = (int64)block_rank() * (FC_THREADS / FC_LANES) + thread_rank() / FC_LANES;
    const bool is_row = place < task.n_rows;
    const int64 row = is_row ? place : task.n_rows - 1;
    const Row r = read_row(task, row);
    char* x = logits_of(task, row);
    const real x_y = is_row ? target_logit(task, r, x) : (real)0;
    RegisterHome home(x, task.n_classes, place_of(task, row, x), r.weight != 0, is_row);
    struct Member : Team<FC_LANES, 1, 1> {
        bool writes;
        FC_DEVICE bool is_first() const { return writes && this->rank() == 0; }
    } team;
    team.writes = is_row;
    do_row(task, row, r, team, home, x_y);
}

#elif FC_FAMILY == BLOCK
/* Rows that the shared memory of a block holds, or that of a cluster of blocks, a slice each. */

typedef Team<32, FC_THREADS / 32, FC_CLUSTER> RowTeam;

struct SharedHome {
    static constexpr bool ON_CHIP = true;
    Span span;
    Granule* held; /* of this block's slice */
    int first, last;
    Place out;
    bool is_read;

    FC_DEVICE SharedHome(char* x, int64 n, const Place& to, bool read) : span(x, n), out(to), is_read(read) {
        const int slice = (span.n_granules + FC_CLUSTER - 1) / FC_CLUSTER;
        const int rank = FC_CLUSTER == 1 ? 0 : (int)cluster_rank();
        held = reinterpret_cast<Granule*>(shared_memory() + (RowTeam::BYTES + 15) / 16 * 16);
        first = rank * slice < span.n_granules ? rank * slice : span.n_granules;
        last = first + slice < span.n_granules ? first + slice : span.n_granules;
        for (int g = first + (int)thread_rank(); is_read && g < last; g += FC_THREADS) {
            if (span.is_whole(g))
                copy_16(held + (g - first), span.base + 16 * (int64)g);
            else
                span.load_ends(g, held[g - first]);
        }
        if (FC_CLUSTER > 1) sync_cluster(); /* no block may be written to before it has begun */
        wait_for_copies();                  /* a thread reads only what it has copied itself */
    }
    template <class F>
    FC_DEVICE void walk(F f) {
        for (int g = first + (int)thread_rank(); is_read && g < last; g += FC_THREADS) {
            Granule x;
            x.bits = held[g - first].bits; /* at once, not number by number */
            span.each(g, x, f);
        }
    }
    template <class F>
    FC_DEVICE void write(F f) {
        for (int g = first + (int)thread_rank(); g < last; g += FC_THREADS) {
            Granule x;
            x.bits = held[g - first].bits;
            span.put(g, x, out, f);
        }
    }
};

FC_CLUSTER_KERNEL(FC_CLUSTER, FC_THREADS, FC_PER_SM) FC_NAME(Task task) {
    const int64 row = block_rank() / FC_CLUSTER;
    const Row r = read_row(task, row);
    char* x = logits_of(task, row);
    const real x_y = target_logit(task, r, x);
    SharedHome home(x, task.n_classes, place_of(task, row, x), r.weight != 0);
    RowTeam team;
    do_row(task, row, r, team, home, x_y);
}

#elif FC_FAMILY == STREAM
/* Longer rows, which are read twice. */

struct StreamHome {
    static constexpr bool ON_CHIP = false;
    Span span;
    Place out;
    bool is_read;

    FC_DEVICE StreamHome(char* x, int64 n, const Place& to, bool read) : span(x, n), out(to), is_read(read) {}
    template <class F>
    FC_DEVICE void walk(F f) {
        for (int g = (int)thread_rank(); is_read && g < span.n_granules; g += FC_THREADS) {
            Granule x;
            span.load(g, x);
            span.each(g, x, f);
        }
    }
    template <class F>
    FC_DEVICE void write(F f) {
        for (int g = (int)thread_rank(); g < span.n_granules; g += FC_THREADS) {
            Granule x;
            if (is_read) span.load(g, x);
            span.put(g, x, out, f);
        }
    }
};

FC_KERNEL(FC_THREADS, FC_PER_SM) FC_NAME(Task task) {
    const int64 row = block_rank();
    const Row r = read_row(task, row);
    char* x = logits_of(task, row);
    const real x_y = target_logit(task, r, x);
    StreamHome home(x, task.n_classes, place_of(task, row, x), r.weight != 0);
    Team<32, FC_THREADS / 32, 1> team;
    do_row(task, row, r, team, home, x_y);
}

#elif FC_FAMILY == COLUMN
/* Classes that are not side by side: a thread for each row, so that neighbours in memory are neighbours in a warp. */

struct ColumnHome {
    static constexpr bool ON_CHIP = FC_CLASSES > 0;
    const char* x;
    char* out;
    int64 stride, out_stride;
    int n_classes;
    bool is_read;
    number held[FC_CLASSES > 0 ? FC_CLASSES : 1];

    FC_DEVICE number at(int k) const { return *reinterpret_cast<const number*>(x + k * stride); }
    FC_DEVICE void load() {
        FC_UNROLL
        for (int k = 0; k < FC_CLASSES; k++)
            if (is_read) held[k] = at(k);
    }
    template <class F>
    FC_DEVICE void walk(F f) {
        if (!is_read) return;
#if FC_CLASSES > 0
        FC_UNROLL
        for (int k = 0; k < FC_CLASSES; k++) f(k, widen(held[k]));
#else
#pragma unroll 4
        for (int k = 0; k < n_classes; k++) f(k, widen(at(k)));
#endif
    }
    template <class F>
    FC_DEVICE void write(F f) {
#if FC_CLASSES > 0
        FC_UNROLL
        for (int k = 0; k < FC_CLASSES; k++)
            narrow(f(k, widen(held[k])), *reinterpret_cast<number*>(out + k * out_stride));
#else
#pragma unroll 4
        for (int k = 0; k < n_classes; k++)
            narrow(f(k, is_read ? widen(at(k)) : (real)0), *reinterpret_cast<number*>(out + k * out_stride));
#endif
    }
};

FC_KERNEL(FC_THREADS, FC_PER_SM) FC_NAME(Task task) {
    const int64 row = (int64)block_rank() * FC_THREADS + thread_rank();
    if (row >= task.n_rows) return;
    const Row r = read_row(task, row);
    ColumnHome home;
    home.x = logits_of(task, row);
    home.out = out_of(task, row);
    home.stride = task.logits.class_stride;
    home.out_stride = task.out.class_stride;
    home.n_classes = (int)task.n_classes;
    home.is_read = r.weight != 0;
    home.load();
    Team<1, 1, 1> team;
    do_row(task, row, r, team, home, target_logit(task, r, home.x));
}

#elif FC_FAMILY == TOTAL
/* A sum over rows in a fixed order: of the losses, or, without these, of what their mean divides by. Block b sums its
   share of the rows, the last one to end sums the blocks. */

FC_DEVICE double total_of(double x) {
    typedef double Slot;
    Slot* slots = reinterpret_cast<Slot*>(shared_memory());
    FC_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
    sync_block(); /* the slots may still be read */
    if (thread_rank() % 32 == 0) slots[thread_rank() / 32] = x;
    sync_block();
    x = 0;
    for (int i = 0; i < FC_THREADS / 32; i++) x += slots[i];
    return x;
}

FC_KERNEL(FC_THREADS, FC_PER_SM) FC_NAME(Task task) {
    int* is_last = reinterpret_cast<int*>(shared_memory() + 8 * (FC_THREADS / 32));
    double x = 0;
    for (int64 row = (int64)block_rank() * FC_THREADS + thread_rank(); row < task.n_rows;
         row += (int64)n_blocks() * FC_THREADS) {
        if (task.loss != nullptr) {
            x += task.loss[row];
        } else {
            const Row r = read_row(task, row);
            if (r.bad && task.error != nullptr) lower_word(task.error, task.error_call + row);
            if (r.weight != 0) x += r.weight * (r.y >= 0 ? (double)class_weight(task, r.y) : 1.0);
        }
    }
    x = total_of(x);
    if (thread_rank() == 0) {
        task.slots[block_rank()] = x;
        fence();
        *is_last = count_up(task.counter, n_blocks() - 1) == n_blocks() - 1;
    }
    sync_block();
    if (!*is_last) return;
    fence();
    x = 0;
    for (unsigned i = thread_rank(); i < n_blocks(); i += FC_THREADS)
        x += *static_cast<volatile double*>(task.slots + i);
    x = total_of(x);
    if (thread_rank() != 0) return;
    if (task.loss == nullptr) {
        *task.total = x;
        return;
    }
    const double normalizer = task.normalizer == nullptr ? 1 : *task.normalizer;
    *task.result = (real)(normalizer == 0 ? task.on_empty : x / normalizer);
}
#endif
