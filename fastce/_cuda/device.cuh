/* The primitives of the kernels, in CUDA. Only this file holds intrinsics and PTX, so that another one can run the same
   kernels on the host. */
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FC_DEVICE __device__ __forceinline__
#define FC_KERNEL(threads, per_sm) extern "C" __global__ void __launch_bounds__(threads, per_sm)
#define FC_UNROLL _Pragma("unroll")

/* 1 where copies into shared memory need no registers, and where blocks form clusters. */
#define FC_HAS_COPIES (__CUDA_ARCH__ >= 800)
#define FC_HAS_CLUSTERS (__CUDA_ARCH__ >= 900)
#if FC_HAS_CLUSTERS
#define FC_CLUSTER_KERNEL(size, threads, per_sm) \
    extern "C" __global__ void __cluster_dims__(size, 1, 1) __launch_bounds__(threads, per_sm)
#else
#define FC_CLUSTER_KERNEL(size, threads, per_sm) FC_KERNEL(threads, per_sm)
#endif

typedef long long int64;
typedef __half half_t;
typedef __nv_bfloat16 bfloat_t;

struct alignas(16) bits16 { unsigned word[4]; };

FC_DEVICE float widen(half_t x) { return __half2float(x); }
FC_DEVICE float widen(bfloat_t x) { return __bfloat162float(x); }
FC_DEVICE float widen(float x) { return x; }
FC_DEVICE double widen(double x) { return x; }
/* To nearest, ties to even. */
FC_DEVICE void narrow(float x, half_t& y) { y = __float2half_rn(x); }
FC_DEVICE void narrow(float x, bfloat_t& y) { y = __float2bfloat16_rn(x); }
FC_DEVICE void narrow(float x, float& y) { y = x; }
FC_DEVICE void narrow(double x, double& y) { y = x; }
FC_DEVICE float exp_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
}
FC_DEVICE float infinity(float) { return __int_as_float(0x7f800000); }
FC_DEVICE double infinity(double) { return __longlong_as_double(0x7ff0000000000000ll); }

FC_DEVICE unsigned thread_rank() { return threadIdx.x; }
FC_DEVICE unsigned block_rank() { return blockIdx.x; }
FC_DEVICE unsigned n_blocks() { return gridDim.x; }

/* The block's dynamic shared memory; kernels have no other. */
FC_DEVICE char* shared_memory() {
    extern __shared__ bits16 fc_shared[];
    return reinterpret_cast<char*>(fc_shared);
}
FC_DEVICE void sync_block() { __syncthreads(); }
/* Shuffles are barriers too, but only this one orders what the threads read and write. */
FC_DEVICE void sync_warp() { __syncwarp(); }

/* The value of the thread whose rank differs by `mask` < 32; all threads of a warp take part. */
FC_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FC_DEVICE double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FC_DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

/* 16 bytes from global to shared memory, both aligned; complete after `wait_for_copies`, for the copying thread. */
FC_DEVICE void copy_16(void* target, const void* source) {
#if FC_HAS_COPIES
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
#else
    *static_cast<bits16*>(target) = *static_cast<const bits16*>(source);
#endif
}
FC_DEVICE void wait_for_copies() {
#if FC_HAS_COPIES
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#if FC_HAS_CLUSTERS
FC_DEVICE unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
/* For all threads of all blocks of a cluster; each then sees what others have stored before. */
FC_DEVICE void sync_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/* Store into another block's shared memory, at the address of `target` in this one's. */
FC_DEVICE void store_remote(float* target, float x, unsigned rank) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target)), remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(x) : "memory");
}
FC_DEVICE void store_remote(double* target, double x, unsigned rank) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(target)), remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(remote), "d"(x) : "memory");
}
#else
FC_DEVICE unsigned cluster_rank() { return 0; }
FC_DEVICE void sync_cluster() { __syncthreads(); }
template <class real>
FC_DEVICE void store_remote(real* target, real x, unsigned) { *target = x; }
#endif

/* Lower a word in memory that the host reads as well. */
FC_DEVICE void lower_word(int64* word, int64 x) { atomicMin(word, x); }
/* Count one up and return what was there; wraps to 0 after `last`. */
FC_DEVICE unsigned count_up(unsigned* counter, unsigned last) { return atomicInc(counter, last); }
/* Other threads see what this thread has stored before the fence no later than what it stores after it. */
FC_DEVICE void fence() { __threadfence(); }
