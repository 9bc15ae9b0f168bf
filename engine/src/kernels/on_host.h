// Enough of CUDA for kernels.cu to run on a CPU, a block after the other and each of a block's
// threads as a thread. For tests: it shows what the kernels compute, not how fast.

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define KERNEL static void
#define INLINE static inline
#define ALIGNED(n) __attribute__((aligned(n)))
// One block at a time runs, so what its threads share can be static.
#define __shared__ static

typedef struct {
  unsigned x;
} place;

static _Thread_local place threadIdx;
static place blockIdx;
static pthread_barrier_t whole_block, warp_barriers[32];
static float slots[1024];

static void __syncthreads(void) { pthread_barrier_wait(&whole_block); }

// What the lane whose number differs in the bits of `lanes` has.
static float __shfl_xor_sync(unsigned all, float x, int lanes) {
  (void)all;
  pthread_barrier_t *warp = &warp_barriers[threadIdx.x / 32];
  slots[threadIdx.x] = x;
  pthread_barrier_wait(warp);
  float other = slots[threadIdx.x ^ (unsigned)lanes];
  pthread_barrier_wait(warp);
  return other;
}

static float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// bf16 is the upper half of a float, rounded to the nearest, ties to even.
typedef struct {
  uint16_t bits;
} bf16;

static float wide_bf16(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float wide;
  memcpy(&wide, &bits, 4);
  return wide;
}

static bf16 narrow_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bf16 narrow = {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  if (x != x) narrow.bits = 0x7fff;
  return narrow;
}

static void (*body)(void *);
static void *arguments;

static void *thread_of(void *number) {
  threadIdx.x = (unsigned)(uintptr_t)number;
  body(arguments);
  return NULL;
}

// Runs `blocks` blocks of `threads` threads of a kernel that `of` calls with its arguments.
static void run(unsigned blocks, unsigned threads, void (*of)(void *), void *with) {
  pthread_t *all = malloc(threads * sizeof *all);
  body = of;
  arguments = with;
  pthread_barrier_init(&whole_block, NULL, threads);
  for (unsigned w = 0; w < threads / 32; w++) pthread_barrier_init(&warp_barriers[w], NULL, 32);
  for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
    for (uintptr_t i = 0; i < threads; i++) pthread_create(&all[i], NULL, thread_of, (void *)i);
    for (unsigned i = 0; i < threads; i++) pthread_join(all[i], NULL);
  }
  free(all);
}
