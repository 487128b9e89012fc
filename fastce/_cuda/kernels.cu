/* The kernels: one for each way of holding a row. Macros, which `_program.py` writes in front, choose one of them:

   FC_NAME             the kernel's name
   FC_FAMILY           TILE, WARP, BLOCK, STREAM, COLUMN or TOTAL, see below
   FC_THREADS          threads of a block
   FC_PER_SM           blocks that have to fit on a multiprocessor
   FC_LANES            (WARP) threads that share a row
   FC_GRANULES         (WARP) pieces of 16 bytes that a thread holds
   FC_CLUSTER          (BLOCK) blocks that share a row
   FC_CLASSES          (COLUMN) the number of classes if they fit into registers, else 0
   FC_T, FC_DOUBLE     the logits' type, and whether it is double
   FC_PROB             the type of class probabilities
   FC_TARGET           the target: 0 an index, 1 an index with label smoothing, 2 probabilities
   FC_OUT              the output beside the losses: 0 none, 1 the gradient, 2 the softmax, 3 the log-softmax
   FC_CAP, FC_STATS, FC_NORMALIZED    1 for a softcap, for statistics, for log-probabilities instead of logits
   FC_TASK_BYTES       sizeof(Task)

   Design
   ------
   1. A row is read from memory once and written once. TILE, WARP and BLOCK hold it on chip in between. STREAM and
      COLUMN are for rows that do not fit there, and read them twice.
   2. Nothing of a row is written before all of it has been read: the reduction of the maximum or of the sums is a
      barrier between the two. So the gradient may overwrite the logits.
   3. Offsets have 64 bits, classes 32.
   4. How a row is held and summed depends on the logits alone. So its results have the same bits wherever they are
      written.
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
FC_DEVICE OutRow out_row_of(const Task& task, int64 row, const char* logits) {
    return OutRow(out_of(task, row), task.out.class_stride, logits);
}

#if FC_FAMILY == TILE
/* Few classes: a block copies as many rows as it has threads into shared memory, where each thread processes one. Rows
   without gaps are copied as one span, others number by number, so that neighbouring threads read neighbours. */

struct TileRow {
    static constexpr bool ON_CHIP = true;
    number* x;
    int n_classes;
    bool is_read;

    template <class F>
    FC_DEVICE void for_each(F f) {
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
FC_DEVICE void for_each_scattered(const Task& task, const Matrix& matrix, int64 start, int n, F f) {
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
        for_each_scattered(task, task.logits, start, n, [&](int i, const number* x) { first[i] = *x; });
    }
    sync_block();
    if ((int)thread_rank() < n) {
        const int64 row = start + thread_rank();
        const Row r = read_row(task, row);
        number* x = first + thread_rank() * task.n_classes;
        TileRow held_row = {x, (int)task.n_classes, r.weight != 0};
        Team<1, 1, 1> team;
        process_row(task, row, r, team, held_row, r.y < 0 ? (real)0 : widen(x[r.y]));
    }
    if (FC_OUT == 0) return;
    sync_block();
    if (task.out.is_dense) {
        const OutRow out(out_of(task, start), sizeof(number), span.base + sizeof(number) * span.before);
        for (int g = (int)thread_rank(); g < span.n_granules; g += FC_THREADS) span.store(g, tile[g], out);
    } else {
        for_each_scattered(task, task.out, start, n, [&](int i, number* y) { *y = first[i]; });
    }
}

#elif FC_FAMILY == WARP
/* Up to a few thousand classes: a warp, or a part of one, holds a row in registers. */

struct RegisterRow {
    static constexpr bool ON_CHIP = true;
    Span span;
    Granule held[FC_GRANULES];
    OutRow out;
    bool is_read, is_row;

    FC_DEVICE RegisterRow(char* x, int64 n, const OutRow& to, bool read, bool row)
        : span(x, n), out(to), is_read(read && row), is_row(row) {
        FC_UNROLL
        for (int i = 0; i < FC_GRANULES; i++)
            if (is_read && granule(i) < span.n_granules) span.load(granule(i), held[i]);
    }
    FC_DEVICE static int granule(int i) { return (int)(thread_rank() % FC_LANES) + i * FC_LANES; }
    template <class F>
    FC_DEVICE void for_each(F f) {
        FC_UNROLL
        for (int i = 0; i < FC_GRANULES; i++)
            if (is_read && granule(i) < span.n_granules) span.for_each(granule(i), held[i], f);
    }
    template <class F>
    FC_DEVICE void write(F f) {
        FC_UNROLL
        for (int i = 0; i < FC_GRANULES; i++)
            if (is_row && granule(i) < span.n_granules) span.put(granule(i), held[i], out, f);
    }
};

FC_KERNEL(FC_THREADS, FC_PER_SM) FC_NAME(Task task) {
    /* Teams without a row take part in the last one, without reading or writing it: all threads of a warp have to. */
    const int64 place = (int64)block_rank() * (FC_THREADS / FC_LANES) + thread_rank() / FC_LANES;
    const bool is_row = place < task.n_rows;
    const int64 row = is_row ? place : task.n_rows - 1;
    const Row r = read_row(task, row);
    char* x = logits_of(task, row);
    const real x_y = is_row ? target_logit(task, r, x) : (real)0;
    RegisterRow held_row(x, task.n_classes, out_row_of(task, row, x), r.weight != 0, is_row);
    struct Member : Team<FC_LANES, 1, 1> {
        bool writes;
        FC_DEVICE bool is_first() const { return writes && this->rank() == 0; }
    } team;
    team.writes = is_row;
    process_row(task, row, r, team, held_row, x_y);
}

#elif FC_FAMILY == BLOCK
/* Rows that fit into the shared memory of a block, or of a cluster of blocks, each of which holds a slice. */

typedef Team<32, FC_THREADS / 32, FC_CLUSTER> RowTeam;

struct SharedRow {
    static constexpr bool ON_CHIP = true;
    Span span;
    Granule* held; /* of this block's slice */
    int first, last;
    OutRow out;
    bool is_read;

    FC_DEVICE SharedRow(char* x, int64 n, const OutRow& to, bool read) : span(x, n), out(to), is_read(read) {
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
        if (FC_CLUSTER > 1) sync_cluster(); /* a block must have started before others store into its memory */
        wait_for_copies();                  /* enough: a thread reads only what it has copied itself */
    }
    template <class F>
    FC_DEVICE void for_each(F f) {
        for (int g = first + (int)thread_rank(); is_read && g < last; g += FC_THREADS) {
            Granule x;
            x.bits = held[g - first].bits; /* at once, not number by number */
            span.for_each(g, x, f);
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
    SharedRow held_row(x, task.n_classes, out_row_of(task, row, x), r.weight != 0);
    RowTeam team;
    process_row(task, row, r, team, held_row, x_y);
}

#elif FC_FAMILY == STREAM
/* Rows that are longer than that, read twice. */

struct StreamRow {
    static constexpr bool ON_CHIP = false;
    Span span;
    OutRow out;
    bool is_read;

    FC_DEVICE StreamRow(char* x, int64 n, const OutRow& to, bool read) : span(x, n), out(to), is_read(read) {}
    template <class F>
    FC_DEVICE void for_each(F f) {
        for (int g = (int)thread_rank(); is_read && g < span.n_granules; g += FC_THREADS) {
            Granule x;
            span.load(g, x);
            span.for_each(g, x, f);
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
    StreamRow held_row(x, task.n_classes, out_row_of(task, row, x), r.weight != 0);
    Team<32, FC_THREADS / 32, 1> team;
    process_row(task, row, r, team, held_row, x_y);
}

#elif FC_FAMILY == COLUMN
/* Classes that are not side by side: a thread for each row, so that neighbours in memory are neighbours in a warp. */

struct ColumnRow {
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
    FC_DEVICE void for_each(F f) {
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
    ColumnRow held_row;
    held_row.x = logits_of(task, row);
    held_row.out = out_of(task, row);
    held_row.stride = task.logits.class_stride;
    held_row.out_stride = task.out.class_stride;
    held_row.n_classes = (int)task.n_classes;
    held_row.is_read = r.weight != 0;
    held_row.load();
    Team<1, 1, 1> team;
    process_row(task, row, r, team, held_row, target_logit(task, r, held_row.x));
}

#elif FC_FAMILY == TOTAL
/* A sum over rows in a fixed order: of the losses, or, if there are none, of the weights that make the normalizer. Each
   block sums a part of the rows, and the last one to finish adds up the blocks' sums. */

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
