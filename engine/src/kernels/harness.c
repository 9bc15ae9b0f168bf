// Runs one kernel of kernels.cu on the CPU: a line `KERNEL TYPE numbers..` on standard input, then
// the kernel's tensors, as they lie in memory; what it wrote goes to standard output. tests.rs
// compiles and calls it.

#include <stdio.h>

#include "kernels.cu"

// A tensor from standard input; `bytes` of it, 16 bytes aligned as a device's memory is.
static void *tensor(size_t bytes) {
  void *all = aligned_alloc(16, (bytes + 31) / 16 * 16);
  if (fread(all, 1, bytes, stdin) != bytes) exit(3);
  return all;
}

static long number(void) {
  long value;
  if (scanf("%ld", &value) != 1) exit(2);
  return value;
}

static const float eps = 1e-6f;
static void *in[6], *out;
static long n[12];

#define CALLS(T)                                                                              \
  static void call_norm_##T(void *with) {                                                     \
    (void)with;                                                                               \
    norm_##T(in[0], in[1], out, n[1], n[2], n[3], n[4], eps);                                 \
  }                                                                                           \
  static void call_gate_##T(void *with) {                                                     \
    (void)with;                                                                               \
    gate_##T(in[0], in[1], in[2], in[3], out, n[0] * n[2] / 8, n[1], n[2], n[3], n[4]);       \
  }                                                                                           \
  static void call_heads_##T(void *with) {                                                    \
    (void)with;                                                                               \
    heads_##T(in[0], in[1], in[2], in[3], in[4], in[5], out, n[0] * n[1] * 3 * n[3], n[0],    \
              n[1], n[2], n[3], n[4], n[5], n[6], eps);                                       \
  }                                                                                           \
  static void call_gelu_##T(void *with) {                                                     \
    (void)with;                                                                               \
    gelu_##T(in[0], in[1], in[2], out, n[0] * (n[1] + n[2]) / 8, n[1], n[2], n[3], n[4]);     \
  }                                                                                           \
  static void call_sum_norm_##T(void *with) {                                                 \
    (void)with;                                                                               \
    sum_norm_##T(in[0], in[1], in[2], out, n[0], n[1], n[2], eps);                            \
  }                                                                                           \
  static void call_place_##T(void *with) {                                                    \
    (void)with;                                                                               \
    T *to = out, *keys = to + n[0] * n[1] * n[3], *values = keys + n[0] * n[2] * n[4] * n[3]; \
    place_##T(in[0], in[1], in[2], in[3], to, keys, values,                                   \
              n[0] * (n[1] + 2 * n[2]) * n[3] / 2, n[1], n[2], n[3], n[4], n[5], n[6], n[7]); \
  }                                                                                           \
  static void call_attend_##T(void *with) {                                                   \
    (void)with;                                                                               \
    attend_##T(in[0], in[1], in[2], in[3], out, n[1], n[2], n[3], n[4], n[5], n[6],           \
               1.0f / sqrtf(n[3]));                                                           \
  }                                                                                           \
  static void call_swiglu_##T(void *with) {                                                   \
    (void)with;                                                                               \
    swiglu_##T(in[0], out, n[0] * n[1] / 8, n[1]);                                            \
  }                                                                                           \
  static void call_widen_##T(void *with) {                                                    \
    (void)with;                                                                               \
    widen_##T(in[0], out, n[0] / 8, ldexpf(1.0f, (int)n[1] - 64));                            \
  }                                                                                           \
  static void call_drop_##T(void *with) {                                                     \
    (void)with;                                                                               \
    drop_##T(in[0], out, n[0] / 8, n[1], n[2], n[3], n[4], n[5] / 64.0f,                      \
             64.0f / (64 - n[5]));                                                            \
  }                                                                                           \
  static void call_norm_back_##T(void *with) {                                                \
    (void)with;                                                                               \
    norm_back_##T(in[0], in[1], in[2], in[3], out, n[1], eps);                                \
  }                                                                                           \
  static void call_gated_##T(void *with) {                                                    \
    (void)with;                                                                               \
    gated_##T(in[0], in[1], out, n[0] / 8);                                                   \
  }                                                                                           \
  static void call_gate_back_##T(void *with) {                                                \
    (void)with;                                                                               \
    gate_back_##T(in[0], in[1], in[2], out, n[0] / 8);                                        \
  }

CALLS(f32)
CALLS(bf16)

static void call_first_of_most(void *with) {
  (void)with;
  first_of_most_f32(in[0], out, n[1]);
}

static void call_adamw(void *with) {
  (void)with;
  adamw_f32(in[0], in[1], in[2], in[3], out, n[0], 0.5f, 0.9f, 0.99f, 0.1f, 0.01f, 0.999f, 0.02f,
            4.0f, 1e-6f);
}

int main(void) {
  char kernel[16], type[16];
  if (scanf("%15s %15s", kernel, type) != 2) return 2;
  int half = strcmp(type, "bf16") == 0;
  size_t size = half ? 2 : 4, written;
  unsigned blocks;
  long count = number(), tensors = number();
  for (long i = 0; i < count; i++) n[i] = number();
  size_t bytes[6];
  for (long i = 0; i < tensors; i++) bytes[i] = number();
  if (getchar() != '\n') return 2;
  for (long i = 0; i < tensors; i++) in[i] = tensor(bytes[i]);
  void (*call)(void *);
  if (strcmp(kernel, "norm") == 0) {
    call = half ? call_norm_bf16 : call_norm_f32;
    written = n[0] * n[2] * size;
    blocks = n[0];
  } else if (strcmp(kernel, "gate") == 0) {
    call = half ? call_gate_bf16 : call_gate_f32;
    written = n[0] * n[2] * size;
    blocks = (n[0] * n[2] / 8 + THREADS - 1) / THREADS;
  } else if (strcmp(kernel, "heads") == 0) {
    call = half ? call_heads_bf16 : call_heads_f32;
    written = 3 * n[0] * n[5] * n[3] * n[4] * size;
    blocks = (n[0] * n[1] * 3 * n[3] * 32 + THREADS - 1) / THREADS;
  } else if (strcmp(kernel, "sum_norm") == 0) {
    call = half ? call_sum_norm_bf16 : call_sum_norm_f32;
    written = 2 * n[0] * n[1] * size;
    blocks = n[0];
  } else if (strcmp(kernel, "place") == 0) {
    // The query, then the caches' keys and values.
    call = half ? call_place_bf16 : call_place_f32;
    written = n[0] * (n[1] + 2 * n[2] * n[4]) * n[3] * size;
    blocks = (n[0] * (n[1] + 2 * n[2]) * n[3] / 2 + THREADS - 1) / THREADS;
  } else if (strcmp(kernel, "attend") == 0) {
    call = half ? call_attend_bf16 : call_attend_f32;
    written = n[0] * n[1] * n[3] * size;
    blocks = n[0] * n[1];
  } else if (strcmp(kernel, "swiglu") == 0) {
    call = half ? call_swiglu_bf16 : call_swiglu_f32;
    written = n[0] * n[1] * size;
    blocks = (n[0] * n[1] / 8 + THREADS - 1) / THREADS;
  } else if (strcmp(kernel, "widen") == 0) {
    call = half ? call_widen_bf16 : call_widen_f32;
    written = n[0] * size;
    blocks = (n[0] / 8 + THREADS - 1) / THREADS;
  } else if (strcmp(kernel, "drop") == 0) {
    call = half ? call_drop_bf16 : call_drop_f32;
    written = n[0] * size;
    blocks = (n[0] / 8 + THREADS - 1) / THREADS;
  } else if (strcmp(kernel, "norm_back") == 0) {
    call = half ? call_norm_back_bf16 : call_norm_back_f32;
    written = n[0] * n[1] * size;
    blocks = n[0];
  } else if (strcmp(kernel, "first_of_most") == 0) {
    call = call_first_of_most;
    written = n[0] * 4;
    blocks = n[0];
  } else if (strcmp(kernel, "adamw") == 0) {
    call = call_adamw;
    written = 3 * n[0] * 4;
    blocks = (n[0] + THREADS - 1) / THREADS;
  } else if (strcmp(kernel, "gated") == 0) {
    call = half ? call_gated_bf16 : call_gated_f32;
    written = n[0] * size;
    blocks = (n[0] / 8 + THREADS - 1) / THREADS;
  } else if (strcmp(kernel, "gate_back") == 0) {
    call = half ? call_gate_back_bf16 : call_gate_back_f32;
    written = 2 * n[0] * size;
    blocks = (n[0] / 8 + THREADS - 1) / THREADS;
  } else {
    call = half ? call_gelu_bf16 : call_gelu_f32;
    written = n[0] * (n[1] + n[2]) * size;
    blocks = (n[0] * (n[1] + n[2]) / 8 + THREADS - 1) / THREADS;
  }
  out = aligned_alloc(16, (written + 31) / 16 * 16);
  memset(out, 0xff, written);
  run(blocks, THREADS, call, NULL);
  return fwrite(out, 1, written, stdout) == written ? 0 : 3;
}
