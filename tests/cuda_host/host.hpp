/* The primitives of device.cuh on the host: the same kernels, compiled by g++, run without a GPU.

   Each CUDA thread is a fiber, all in one OS thread: runs repeat exactly, and barriers that a kernel uses wrongly are
   errors. With FC_HOST_THREADS each is an OS thread, for ThreadSanitizer; there a wrong barrier may hang, so run the
   fibers first. Blocks run one after another, those of a cluster together.

   FC_HOST_BACKWARDS runs the fibers in falling order: what works in one order only lacks a barrier.

   FC_HOST_FLUSH takes numbers below the normal ones for 0, as CuPy has float arithmetic do on a device; here that of
   double does so too. */
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <source_location>
#include <vector>

#ifdef FC_HOST_THREADS
#include <barrier>
#include <deque>
#include <thread>
#else
#include <sys/mman.h>
#if !(defined(__x86_64__) && defined(__linux__)) && !defined(FC_HOST_UCONTEXT)
#define FC_HOST_UCONTEXT
#endif
#ifdef FC_HOST_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#endif

#ifdef FC_HOST_FLUSH
#include <xmmintrin.h>
#endif

#ifdef __SANITIZE_THREAD__
extern "C" void AnnotateIgnoreSyncBegin(const char* file, int line);
extern "C" void AnnotateIgnoreSyncEnd(const char* file, int line);
#endif

#define FC_DEVICE inline
#define FC_HOST_JOIN_(a, b) a##b
#define FC_HOST_JOIN(a, b) FC_HOST_JOIN_(a, b)
#define FC_KERNEL(threads, per_sm) FC_CLUSTER_KERNEL(1, threads, per_sm)
#define FC_CLUSTER_KERNEL(size, threads, per_sm)                                                                \
    [[maybe_unused]] static const bool FC_HOST_JOIN(fc_host_declared_, __LINE__) = fc_host::declare(threads, size); \
    extern "C" void
#define FC_UNROLL
#define FC_HAS_COPIES 1
#define FC_HAS_CLUSTERS 1

using std::max;
using std::exp;
using std::fmax;
using std::log1p;
using std::min;
using std::tanh;

typedef long long int64;
struct half_t { unsigned short bits; };
struct bfloat_t { unsigned short bits; };
struct alignas(16) bits16 { unsigned word[4]; };

FC_DEVICE float widen(half_t x) {
    unsigned sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31u, fraction = x.bits & 0x3ffu;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | fraction << 13);
    if (exponent) return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
    float y = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -y : y;
}
FC_DEVICE float widen(bfloat_t x) { return std::bit_cast<float>(static_cast<unsigned>(x.bits) << 16); }
FC_DEVICE float widen(float x) { return x; }
FC_DEVICE double widen(double x) { return x; }
/* Each NaN becomes 0x7fff, as in CUDA. */
FC_DEVICE void narrow(float x, half_t& y) {
    unsigned bits = std::bit_cast<unsigned>(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu, z;
    if (rest > 0x7f800000u) z = 0x7fff, sign = 0;
    else if (rest >= 0x477ff000u) z = 0x7c00;  // from 65520, halfway from the greatest number to the next power of 2
    else if (rest >= 0x38800000u) z = (rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u) >> 13;
    else z = std::bit_cast<unsigned>(std::bit_cast<float>(rest) + 0.5f) - 0x3f000000u;  // the sum rounds at 2^-24
    y.bits = static_cast<unsigned short>(sign | z);
}
FC_DEVICE void narrow(float x, bfloat_t& y) {
    unsigned bits = std::bit_cast<unsigned>(x);
    y.bits = static_cast<unsigned short>(x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
FC_DEVICE void narrow(float x, float& y) { y = x; }
FC_DEVICE void narrow(double x, double& y) { y = x; }
FC_DEVICE float exp_fast(float x) { return exp2f(x * 1.4426950408889634f); }
FC_DEVICE float infinity(float) { return HUGE_VALF; }
FC_DEVICE double infinity(double) { return HUGE_VAL; }

/* Everything has internal linkage: a process loads many kernels, and none may see another's state. */
namespace fc_host {
namespace {

using where_t = std::source_location;

constexpr unsigned WARP = 32;
constexpr size_t STACK = 65536, GUARD = 4096;

enum State { RUNNING, AT_SHUFFLE, AT_BLOCK, AT_CLUSTER, RETURNED, FAILED };
constexpr const char* NAMES[] = {"", "shuffle_xor", "sync_block", "sync_cluster", "", ""};

struct Block;

struct Copy {
    void* target;
    const void* source;
};

struct Thread {
    Block* block;
    unsigned rank;
    unsigned passed[4];             // barriers of each kind that it has come to
    std::atomic<uint64_t> slots[2]; // what it shows the warp; in turn, as one may be read still when the next is set
    std::vector<Copy> copies;

#ifndef FC_HOST_THREADS
    State state;
    where_t where;
    bool fresh = true;
    char* stack = nullptr;
#ifdef FC_HOST_UCONTEXT
    ucontext_t context;
#else
    void* context;
#endif
    void* fake_stack = nullptr;

    ~Thread() {
        if (stack) munmap(stack, STACK);
    }
#endif
};

struct Block {
    unsigned rank, cluster_rank;
    char* shared;
    Thread* threads;
};

struct Launch {
    unsigned grid, block, cluster;
    size_t shared_bytes;
    void (*call)(const Launch&);
    void (*kernel)();
    const void* task;
};

struct Declared {
    unsigned count, threads, cluster;
};

/* Initialised before the kernels' declarations, which run when the library is loaded. */
constinit Declared declared{};
Launch launch;
std::mutex one_launch, one_error;
char error[512];
std::unique_ptr<Thread[]> pool;
size_t pool_size;
std::vector<Block> blocks; // of the cluster that runs

#ifdef FC_HOST_THREADS
thread_local Thread* self;
#else
Thread* self;
#endif

[[maybe_unused]] bool declare(unsigned threads, unsigned cluster) {
    declared = {declared.count + 1, threads, cluster};
    return true;
}

/* The first error stays. */
__attribute__((format(printf, 1, 2))) void record(const char* format, ...) {
    std::lock_guard<std::mutex> lock(one_error);
    if (error[0]) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, sizeof error, format, arguments);
    va_end(arguments);
}

void prepare_pool() {
    size_t n = size_t(launch.cluster) * launch.block;
    if (pool_size < n) {
        pool.reset(new Thread[n]);
        pool_size = n;
    }
    blocks.resize(launch.cluster);
}

void prepare_thread(Block& block, unsigned rank) {
    Thread& thread = block.threads[rank];
    thread.block = &block;
    thread.rank = rank;
    std::fill_n(thread.passed, 4, 0u);
    thread.copies.clear();
}

#ifdef FC_HOST_THREADS

std::unique_ptr<std::barrier<>> cluster_barrier;
std::deque<std::barrier<>> block_barriers;
std::deque<std::atomic<int>> warps; // how often a thread of the warp has come to a shuffle

/* More than all shuffles of a thread, so that nobody waits for one that has returned. */
constexpr int GONE = 1 << 25;

void wait(State state, where_t) {
    Thread& me = *self;
    unsigned round = ++me.passed[state], rank = me.block->cluster_rank;
    if (state == AT_CLUSTER) {
        cluster_barrier->arrive_and_wait();
    } else if (state == AT_BLOCK) {
        block_barriers[rank].arrive_and_wait();
    } else {
        std::atomic<int>& count = warps[(rank * launch.block + me.rank) / WARP];
        int target = static_cast<int>(round * WARP), n = ++count;
        if (n == target) count.notify_all();
        for (; n < target; n = count) count.wait(n);
    }
}

[[maybe_unused]] void fail(const char* what) {
    record("block %u, thread %u: %s", self->block->rank, self->rank, what);
}

void run_thread(Thread& thread) {
    self = &thread;
    launch.call(launch);
    unsigned rank = thread.block->cluster_rank;
    std::atomic<int>& count = warps[(rank * launch.block + thread.rank) / WARP];
    count += GONE;
    count.notify_all();
    block_barriers[rank].arrive_and_drop();
    cluster_barrier->arrive_and_drop();
}

/* All threads of a scope have come to as many of its barriers. */
void check_passed(State state, size_t scope) {
    size_t n = size_t(launch.cluster) * launch.block;
    for (size_t i = 0; i < n; i++)
        if (pool[i].passed[state] != pool[i / scope * scope].passed[state])
            record("block %u: threads have returned while others waited at %s", pool[i].block->rank, NAMES[state]);
}

void run_cluster() {
    size_t n = size_t(launch.cluster) * launch.block;
    cluster_barrier = std::make_unique<std::barrier<>>(n);
    block_barriers.clear();
    warps.clear();
    for (unsigned i = 0; i < launch.cluster; i++) block_barriers.emplace_back(launch.block);
    for (size_t i = 0; i < n / WARP; i++) warps.emplace_back(0);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < n; i++) threads.emplace_back(run_thread, std::ref(pool[i]));
    for (std::thread& thread : threads) thread.join();
    check_passed(AT_SHUFFLE, WARP);
    check_passed(AT_BLOCK, launch.block);
    check_passed(AT_CLUSTER, n);
}

#else

/* Two ways to go on in another context: `swap_context` keeps this one in `from`. ucontext saves the signal mask as
   well, by a system call, which takes longer than the rest of a barrier. */
#ifdef FC_HOST_UCONTEXT
ucontext_t scheduler;

void swap_context(ucontext_t& from, ucontext_t& to) { swapcontext(&from, &to); }
void make_context(Thread& thread, void (*entry)()) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack + GUARD;
    thread.context.uc_stack.ss_size = STACK - GUARD;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, entry, 0);
}
#else
void* scheduler;

extern "C" __attribute__((visibility("hidden"))) void fc_host_swap(void** from, void* to);
asm(R"(
    .pushsection .text
    .globl fc_host_swap
    .hidden fc_host_swap
    .type fc_host_swap, @function
fc_host_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fc_host_swap, .-fc_host_swap
    .popsection
)");

void swap_context(void*& from, void* to) { fc_host_swap(&from, to); }
void make_context(Thread& thread, void (*entry)()) {
    /* Six registers, where to return to, and 8 bytes more, as if `entry` had been called. */
    uint64_t* top = reinterpret_cast<uint64_t*>(thread.stack + STACK) - 8;
    std::fill_n(top, 8, uint64_t(0));
    top[6] = reinterpret_cast<uint64_t>(entry);
    thread.context = top;
}
#endif

#ifdef __SANITIZE_ADDRESS__
const void* scheduler_stack;
size_t scheduler_bytes;
#endif

/* From a fiber to the scheduler, until that resumes it. */
void leave() {
    Thread& me = *self;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&me.fake_stack, scheduler_stack, scheduler_bytes);
#endif
    swap_context(me.context, scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(me.fake_stack, &scheduler_stack, &scheduler_bytes);
#endif
}

/* What a fiber runs: the kernel for one CUDA thread after another. */
void fiber() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_bytes);
#endif
    for (;;) {
        launch.call(launch);
        self->state = RETURNED;
        leave();
    }
}

void resume(Thread& thread) {
    if (thread.fresh) {
        if (!thread.stack) {
            void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (stack == MAP_FAILED || mprotect(stack, GUARD, PROT_NONE)) abort();
            thread.stack = static_cast<char*>(stack);
        }
#ifdef __SANITIZE_ADDRESS__
        ASAN_UNPOISON_MEMORY_REGION(thread.stack + GUARD, STACK - GUARD);
#endif
        make_context(thread, fiber);
        thread.fresh = false;
    }
    self = &thread;
    thread.state = RUNNING;
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, thread.stack + GUARD, STACK - GUARD);
#endif
    swap_context(scheduler, thread.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void wait(State state, where_t where) {
    self->passed[state]++;
    self->state = state;
    self->where = where;
    leave();
}

[[maybe_unused]] void fail(const char* what) {
    record("block %u, thread %u: %s", self->block->rank, self->rank, what);
    self->state = FAILED;
    leave();
}

/* Two threads that a barrier should have joined. */
bool disagree(const Thread& a, const Thread& b) {
    if (a.state == RETURNED) return disagree(b, a);
    if (b.state == RETURNED)
        record("thread %u of block %u has returned while thread %u of block %u waits at %s in line %u", b.rank,
               b.block->rank, a.rank, a.block->rank, NAMES[a.state], unsigned(a.where.line()));
    else
        record("divergent barrier: thread %u of block %u waits at %s in line %u, "
               "thread %u of block %u at %s in line %u",
               a.rank, a.block->rank, NAMES[a.state], unsigned(a.where.line()), b.rank, b.block->rank, NAMES[b.state],
               unsigned(b.where.line()));
    return false;
}

/* The i-th of n in the order in which they run. */
unsigned in_order(unsigned i, unsigned n) {
#ifdef FC_HOST_BACKWARDS
    return n - 1 - i;
#else
    return (void)n, i;
#endif
}

/* Run a warp until its threads have returned or wait for more than the warp. */
bool run_warp(Thread* warp) {
    do {
        for (unsigned i = 0; i < WARP; i++) {
            Thread& thread = warp[in_order(i, WARP)];
            resume(thread);
            if (thread.state == FAILED) return false;
        }
        for (unsigned i = 1; i < WARP; i++) {
            bool same = warp[i].state == warp[0].state;
            if (same && warp[0].state != RETURNED)
                same = warp[i].where.line() == warp[0].where.line() && warp[i].where.column() == warp[0].where.column();
            if (!same) return disagree(warp[0], warp[i]);
        }
    } while (warp[0].state == AT_SHUFFLE);
    return true;
}

bool run_block(Block& block) {
    do {
        for (unsigned i = 0; i < launch.block; i += WARP)
            if (!run_warp(block.threads + in_order(i / WARP, launch.block / WARP) * WARP)) return false;
        for (unsigned i = WARP; i < launch.block; i += WARP)
            if (block.threads[i].state != block.threads[0].state) return disagree(block.threads[0], block.threads[i]);
    } while (block.threads[0].state == AT_BLOCK);
    return true;
}

void run_cluster() {
    for (Block& block : blocks)
        for (unsigned i = 0; i < launch.block; i++) block.threads[i].state = RUNNING;
    const Thread& first = *blocks[0].threads;
    bool good = true;
    do {
        for (unsigned i = 0; i < launch.cluster && good; i++) good = run_block(blocks[in_order(i, launch.cluster)]);
        for (unsigned i = 1; i < launch.cluster && good; i++)
            if (blocks[i].threads[0].state != first.state) good = disagree(first, *blocks[i].threads);
    } while (good && first.state == AT_CLUSTER);
    /* Fibers in the middle of a kernel cannot run another. */
    if (!good)
        for (size_t i = 0; i < pool_size; i++) pool[i].fresh = true;
}

#endif

/* 16 bytes, or what `size` says, of this block's shared memory. */
bool is_shared(const void* p, size_t size) {
    uintptr_t offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(self->block->shared);
    return offset <= launch.shared_bytes && size <= launch.shared_bytes - offset;
}

template <class real>
real shuffle(real x, int mask, where_t where) {
    if (mask < 0 || mask >= int(WARP)) {
        fail("shuffle_xor with a mask that no warp has");
        return x;
    }
    /* CUDA's shuffles order no accesses to memory, so ThreadSanitizer must not take them for order. */
#ifdef __SANITIZE_THREAD__
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
#endif
    Thread& me = *self;
    unsigned side = me.passed[AT_SHUFFLE] % 2;
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof x);
    me.slots[side] = bits;
    wait(AT_SHUFFLE, where);
    bits = me.block->threads[me.rank ^ unsigned(mask)].slots[side];
    memcpy(&x, &bits, sizeof x);
#ifdef __SANITIZE_THREAD__
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
#endif
    return x;
}

template <class real>
void store(real* target, real x, unsigned rank) {
    if (rank >= launch.cluster) return fail("store_remote to a block that the cluster has not");
    if (!is_shared(target, sizeof x)) return fail("store_remote outside of shared memory");
    Block& block = blocks[rank];
    if (&block != self->block && !self->passed[AT_CLUSTER])
        return fail("store_remote to a block that may not have begun: no sync_cluster before it");
#ifndef FC_HOST_THREADS
    if (block.threads->state == RETURNED) return fail("store_remote to a block that may have returned");
#endif
    *reinterpret_cast<real*>(block.shared + (reinterpret_cast<char*>(target) - self->block->shared)) = x;
}

void check_launch() {
    const Launch& l = launch;
    if (!l.grid) record("no blocks");
    if (!l.block || l.block > 1024 || l.block % WARP) record("%u threads are no block of whole warps", l.block);
    if (!l.cluster || l.cluster > 16) record("%u blocks are no cluster", l.cluster);
    else if (l.grid % l.cluster) record("%u blocks are no whole clusters of %u", l.grid, l.cluster);
    if (l.shared_bytes > 232448) record("%zu bytes of shared memory are too many", l.shared_bytes);
    if (declared.count == 1) {
        if (l.block > declared.threads) record("%u threads, declared for %u", l.block, declared.threads);
        if (l.cluster != declared.cluster) record("clusters of %u, declared for %u", l.cluster, declared.cluster);
    }
}

template <class Task>
void call(const Launch& l) {
    reinterpret_cast<void (*)(Task)>(l.kernel)(*static_cast<const Task*>(l.task));
}

/* For as long as it lives. */
struct Flush {
#ifdef FC_HOST_FLUSH
    const unsigned before = _mm_getcsr();
    Flush() { _mm_setcsr(before | 0x8040); } // results and operands
    ~Flush() { _mm_setcsr(before); }
#endif
};

template <class Task>
constexpr size_t task_bytes(void (*)(Task)) {
    return sizeof(Task);
}

template <class Task>
int run(void (*kernel)(Task), const void* task, unsigned grid, unsigned block, unsigned cluster, size_t shared_bytes,
        char* message, size_t message_bytes) {
    std::lock_guard<std::mutex> lock(one_launch);
    Task own;
    memcpy(&own, task, sizeof own);
    launch = {grid, block, cluster, shared_bytes, call<Task>, reinterpret_cast<void (*)()>(kernel), &own};
    error[0] = 0;
    check_launch();
    if (!error[0]) prepare_pool();
    [[maybe_unused]] const Flush flush;
    for (unsigned begin = 0; begin < grid && !error[0]; begin += cluster) {
        for (unsigned i = 0; i < cluster; i++) {
            /* Exactly as many bytes as asked for: AddressSanitizer sees what goes beyond. */
            char* shared = static_cast<char*>(malloc(shared_bytes));
            memset(shared, 0xff, shared_bytes);
            blocks[i] = {begin + i, i, shared, &pool[size_t(i) * block]};
            for (unsigned k = 0; k < block; k++) prepare_thread(blocks[i], k);
        }
        run_cluster();
        for (Block& b : blocks) free(b.shared);
    }
    /* A process may map so many pieces of memory, and every kernel is a library with a pool of its own. */
    pool.reset();
    pool_size = 0;
    if (message_bytes) snprintf(message, message_bytes, "%s", error);
    return error[0] != 0;
}

} // namespace
} // namespace fc_host

/* What a program or another language calls, for the one kernel of a library. */
#define FC_HOST_ENTRY(kernel)                                                                                   \
    extern "C" {                                                                                                \
    size_t fc_host_task_bytes = fc_host::task_bytes(&kernel);                                                   \
    int fc_host_run(const void* task, unsigned grid, unsigned block, unsigned cluster, size_t shared_bytes,     \
                    char* message, size_t message_bytes) {                                                      \
        return fc_host::run(&kernel, task, grid, block, cluster, shared_bytes, message, message_bytes);         \
    }                                                                                                           \
    }

FC_DEVICE unsigned thread_rank() { return fc_host::self->rank; }
FC_DEVICE unsigned block_rank() { return fc_host::self->block->rank; }
FC_DEVICE unsigned n_blocks() { return fc_host::launch.grid; }
FC_DEVICE unsigned cluster_rank() { return fc_host::self->block->cluster_rank; }

FC_DEVICE char* shared_memory() { return fc_host::self->block->shared; }

/* The last parameter of each barrier is the line that uses it. */
FC_DEVICE void sync_block(fc_host::where_t where = fc_host::where_t::current()) {
    fc_host::wait(fc_host::AT_BLOCK, where);
}
FC_DEVICE void sync_cluster(fc_host::where_t where = fc_host::where_t::current()) {
    fc_host::wait(fc_host::AT_CLUSTER, where);
}
FC_DEVICE void sync_warp(fc_host::where_t where = fc_host::where_t::current()) {
    fc_host::wait(fc_host::AT_SHUFFLE, where);
}
FC_DEVICE float shuffle_xor(float x, int mask, fc_host::where_t where = fc_host::where_t::current()) {
    return fc_host::shuffle(x, mask, where);
}
FC_DEVICE double shuffle_xor(double x, int mask, fc_host::where_t where = fc_host::where_t::current()) {
    return fc_host::shuffle(x, mask, where);
}
FC_DEVICE int shuffle_xor(int x, int mask, fc_host::where_t where = fc_host::where_t::current()) {
    return fc_host::shuffle(x, mask, where);
}

/* Nothing is copied before the wait, so that a kernel without one computes with what was there before. */
FC_DEVICE void copy_16(void* target, const void* source) {
    if ((reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(source)) % 16)
        return fc_host::fail("copy_16 of an unaligned address");
    if (!fc_host::is_shared(target, 16)) return fc_host::fail("copy_16 to outside of shared memory");
    fc_host::self->copies.push_back({target, source});
}
FC_DEVICE void wait_for_copies() {
    for (const fc_host::Copy& copy : fc_host::self->copies)
        *static_cast<bits16*>(copy.target) = *static_cast<const bits16*>(copy.source);
    fc_host::self->copies.clear();
}

FC_DEVICE void store_remote(float* target, float x, unsigned rank) { fc_host::store(target, x, rank); }
FC_DEVICE void store_remote(double* target, double x, unsigned rank) { fc_host::store(target, x, rank); }

FC_DEVICE void lower_word(int64* word, int64 x) {
    std::atomic_ref<int64> shared(*word);
    for (int64 old = shared; x < old && !shared.compare_exchange_weak(old, x);) {}
}
FC_DEVICE unsigned count_up(unsigned* counter, unsigned last) {
    std::atomic_ref<unsigned> shared(*counter);
    unsigned old = shared;
    while (!shared.compare_exchange_weak(old, old >= last ? 0 : old + 1)) {}
    return old;
}
FC_DEVICE void fence() {
    /* ThreadSanitizer knows no fences; the atomics above order as much. */
#ifndef __SANITIZE_THREAD__
    std::atomic_thread_fence(std::memory_order_seq_cst);
#endif
}
