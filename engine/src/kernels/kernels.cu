// Our CUDA kernels: what lies between the products of a Flux block (flux.inc), of a step of a
// language model (decoder.inc) and of a layer of one that learns (learn.inc), each in one pass over
// memory. All of it is computed in f32,
// whatever the storage.
//
// Widths are multiples of 8, so that a thread reads and writes 16 bytes of half precision at a
// time. The same file is C: a test compiles it for the CPU (on_host.h plays the threads) and
// compares with the tensor operations. Called from kernels.rs.

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef __nv_bfloat16 bf16;
typedef __half f16;
#define KERNEL extern "C" __global__ void
#define INLINE static __device__ __forceinline__
#define ALIGNED(n) __align__(n)
INLINE float wide_bf16(bf16 x) { return __bfloat162float(x); }
INLINE bf16 narrow_bf16(float x) { return __float2bfloat16(x); }
INLINE float wide_f16(f16 x) { return __half2float(x); }
INLINE f16 narrow_f16(float x) { return __float2half(x); }
#else
#include "on_host.h"
#endif

INLINE float wide_f32(float x) { return x; }
INLINE float narrow_f32(float x) { return x; }

typedef float f32;
typedef long long wide_int;

// Threads of a block; tests/gpu/NOTES.md has no measurement of another number yet.
#define THREADS 128

// The sum over a warp, in all of its lanes.
INLINE float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// The sum over a block, in all of its threads.
INLINE float block_sum(float x, float *warps) {
  x = warp_sum(x);
  // Who reads an earlier sum has to be done first.
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < THREADS / 32; i++) sum += warps[i];
  return sum;
}

// GELU by the tanh approximation.
INLINE float gelu(float x) {
  return 0.5f * x * (1.0f + tanhf(0.79788456f * x * (1.0f + 0.044715f * x * x)));
}

// f16 overflows in the late blocks of FLUX.1: held to its finite range there.
INLINE float held(float x, float most) {
  // Comparisons, not fminf: NaN stays NaN.
  return x > most ? most : x < -most ? -most : x;
}

typedef struct ALIGNED(8) {
  unsigned char v[8];
} CODES;

// The value of an 8-bit float (e4m3, NaN apart): its exponent and mantissa where a float's lowest
// ones are, brought up by 2^120.
INLINE float value_of(unsigned char code) {
  float small = __uint_as_float((code & 0x7fu) << 20) * 1.329227995784916e36f;
  return code & 0x80u ? -small : small;
}

// The place of the greatest of each row's n numbers, the first of equals; what is no number where
// one of them is none. One block a row.
KERNEL first_of_most_f32(const float *x, float *out, int n) {
  __shared__ float most[THREADS];
  __shared__ int at[THREADS];
  const float *row = x + (wide_int)blockIdx.x * n;
  float best = -INFINITY;
  int place = 0, numbers = 1;
  for (int i = threadIdx.x; i < n; i += THREADS) {
    float value = row[i];
    numbers &= value == value;
    if (value > best || i == (int)threadIdx.x) {
      best = value;
      place = i;
    }
  }
  most[threadIdx.x] = best;
  at[threadIdx.x] = !numbers ? -1 : (int)threadIdx.x < n ? place : n;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    int mine = threadIdx.x, other = mine + half;
    if (mine < half) {
      int better = most[other] > most[mine] || (most[other] == most[mine] && at[other] < at[mine]);
      if (at[mine] < 0 || at[other] < 0)
        at[mine] = -1;
      else if (at[other] < n && (better || at[mine] >= n)) {
        most[mine] = most[other];
        at[mine] = at[other];
      }
    }
  }
  if (threadIdx.x == 0) out[blockIdx.x] = at[0] < 0 ? NAN : (float)at[0];
}

// A step of AdamW (optim.rs) for a weight, its two means and its gradient: what all three become,
// one after the other. A thread a number.
KERNEL adamw_f32(const float *weight, const float *first, const float *second, const float *slope,
                 float *out, wide_int count, float clip, float beta1, float beta2, float rest1,
                 float rest2, float keep, float size, float correct, float eps) {
  wide_int i = (wide_int)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count) return;
  float g = slope[i] * clip;
  float m = first[i] * beta1 + g * rest1, v = second[i] * beta2 + g * g * rest2;
  out[i] = weight[i] * keep - m * size / (sqrtf(v * correct) + eps);
  out[count + i] = m;
  out[2 * count + i] = v;
}

// The kernels for each type, with its name at the end of theirs: norm_bf16.
#define JOINED(name, type) name##_##type
#define NAMED(name, type) JOINED(name, type)
#define OF_T(name) NAMED(name, T)
#define EIGHT OF_T(eight)
#define PAIR OF_T(pair)

#define T f32
#define MOST INFINITY
#include "flux.inc"
#include "decoder.inc"
#include "learn.inc"
#undef T

#define T bf16
#include "flux.inc"
#include "decoder.inc"
#include "learn.inc"
#undef T
#undef MOST

#ifdef __CUDACC__
#define T f16
#define MOST 65504.0f
#include "flux.inc"
#include "decoder.inc"
#include "learn.inc"
#endif
