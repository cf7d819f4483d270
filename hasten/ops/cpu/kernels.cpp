// Kernels for one row or a few on a CPU, behind a plain C interface. See product.h for how they work.
//
// One file holds every instruction set: product.h and what stands on it are compiled once for each, and the first call asks the
// processor. Nothing here needs a library beside the C one; the threads are our own (pool.h).

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "calls.h"
#include "numbers.h"
#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#endif

#if defined(__clang__)
#define TARGET_BEGIN(names) _Pragma("clang attribute push(__attribute__((target(" names "))), apply_to = function)")
#define TARGET_END _Pragma("clang attribute pop")
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says that of its own intrinsics
#endif

#ifndef HASTEN_STAMP
#define HASTEN_STAMP ""
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Of rows of x as float32, each padded with zeros, and a vector more.
size_t wide_bytes(int64_t tokens, int64_t columns) {
    return (size_t(tokens * ((columns + 15) / 16 * 16) + 16) * sizeof(float) + 63) / 64 * 64;
}
}  // namespace

namespace portable {
#define WIDTH 8
struct Lanes {
    float of[WIDTH];
};
template <class T> inline Lanes load(const T *p) {
    Lanes v;
    for (int i = 0; i < WIDTH; i++) v.of[i] = widen(p[i]);
    return v;
}
inline Lanes fill(float f) {
    Lanes v;
    for (int i = 0; i < WIDTH; i++) v.of[i] = f;
    return v;
}
inline void store(float *p, Lanes v) { memcpy(p, v.of, sizeof(v.of)); }
inline Lanes add(Lanes a, Lanes b) {
    for (int i = 0; i < WIDTH; i++) a.of[i] += b.of[i];
    return a;
}
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) {
    for (int i = 0; i < WIDTH; i++) c.of[i] += a.of[i] * b.of[i];
    return c;
}
inline float sum(Lanes a) {
    float s = 0;
    for (int i = 0; i < WIDTH; i++) s += a.of[i];
    return s;
}
#include "product.h"
#include "attention.h"
#include "stack.h"
#undef WIDTH
}  // namespace portable

#if X86
#if defined(__clang__)
TARGET_BEGIN("\"avx2,fma,f16c\"")
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace avx2 {
#define WIDTH 8
using Lanes = __m256;
inline Lanes load(const float *p) { return _mm256_loadu_ps(p); }
inline Lanes load(const bfloat16 *p) {
    __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Lanes load(const float16 *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
inline Lanes fill(float f) { return _mm256_set1_ps(f); }
inline void store(float *p, Lanes v) { _mm256_storeu_ps(p, v); }
inline Lanes add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Lanes a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#include "product.h"
#include "attention.h"
#include "stack.h"
#undef WIDTH
}  // namespace avx2
#if defined(__clang__)
TARGET_END
TARGET_BEGIN("\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c\"")
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace avx512 {
#define WIDTH 16
using Lanes = __m512;
inline Lanes load(const float *p) { return _mm512_loadu_ps(p); }
inline Lanes load(const bfloat16 *p) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Lanes load(const float16 *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
inline Lanes fill(float f) { return _mm512_set1_ps(f); }
inline void store(float *p, Lanes v) { _mm512_storeu_ps(p, v); }
inline Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a); }
#include "product.h"
#include "attention.h"
#include "stack.h"
#undef WIDTH
}  // namespace avx512
#if defined(__clang__)
TARGET_END
#else
#pragma GCC pop_options
#endif
#endif

// ---- the interface

namespace {
enum Level { PORTABLE, AVX2, AVX512 };

int best() {
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

// A call of the function `name<T>` of an instruction set, T by its number.
#define TYPED(set, number, name, ...)                                            \
    ((number) == FLOAT32    ? set::name<float>(__VA_ARGS__)                      \
     : (number) == BFLOAT16 ? set::name<bfloat16>(__VA_ARGS__)                   \
                            : set::name<float16>(__VA_ARGS__))
#if X86
#define CHOOSE(level, number, name, ...)                                         \
    ((level) == AVX512 ? TYPED(avx512, number, name, __VA_ARGS__)                \
     : (level) == AVX2 ? TYPED(avx2, number, name, __VA_ARGS__)                  \
                       : TYPED(portable, number, name, __VA_ARGS__))
#else
#define CHOOSE(level, number, name, ...) ((void)(level), TYPED(portable, number, name, __VA_ARGS__))
#endif
}  // namespace

// What the library was built from.
EXPORT const char *hasten_stamp() { return HASTEN_STAMP; }

// The best instruction set of this processor: 0 portable, 1 AVX2, 2 AVX512.
EXPORT int hasten_level() { return best(); }

// Strides are in elements. y is contiguous, tokens x outputs. Returns 0, or 1 where there is no memory.
EXPORT int hasten_product(int level, int threads, int number, int64_t tokens, int64_t rows, int64_t columns,
                          const void *x, int64_t x_stride, const void *w, int64_t w_stride, const void *bias, void *y,
                          int norm, const void *norm_weight, const void *norm_bias, float eps, float offset, int act,
                          int gated, const void *residual, int64_t residual_stride, float scale) {
    Product p;
    p.rows = rows, p.columns = columns, p.tokens = tokens;
    p.x = x, p.w = w, p.bias = bias, p.residual = residual, p.y = y;
    p.x_stride = x_stride, p.w_stride = w_stride, p.residual_stride = residual_stride;
    p.norm = {norm_weight, norm_bias, norm, eps, offset};
    p.act = act, p.gated = gated != 0, p.scale = scale;
    if (tokens == 0 || rows == 0) return 0;
    p.wide = static_cast<float *>(aligned_alloc(64, wide_bytes(tokens, columns)));
    if (!p.wide) return 1;
    CHOOSE(level, number, multiply_all, threads, p);
    free(p.wide);
    return 0;
}

// q (tokens, heads, dim) by strides; pools (pages, page_size, kv_heads, dim) and y contiguous; dim at most 256.
EXPORT void hasten_attend(int level, int threads, int number, int64_t tokens, int64_t sequences, int64_t heads,
                          int64_t kv_heads, int64_t dim, const void *q, int64_t q_token, int64_t q_head,
                          const void *keys, const void *values, int64_t page_size, const int64_t *tables,
                          int64_t table_row, const int64_t *starts, const int64_t *lengths, float scale, float softcap,
                          int64_t window, const float *slopes, const void *sinks, void *y) {
    Attend a;
    a.tokens = tokens, a.sequences = sequences, a.heads = heads, a.kv_heads = kv_heads, a.dim = dim;
    a.q = q, a.q_token = q_token, a.q_head = q_head, a.keys = keys, a.values = values, a.page_size = page_size;
    a.tables = tables, a.table_row = table_row, a.starts = starts, a.lengths = lengths;
    a.scale = scale, a.softcap = softcap, a.window = window, a.slopes = slopes, a.sinks = sinks, a.y = y;
    CHOOSE(level, number, attend_all, threads, a);
}

// Keys and values of `bytes` each, `k_row` and `v_row` bytes apart, into their slots of two pools; negative: nowhere.
EXPORT void hasten_write(int64_t tokens, int64_t bytes, const char *k, int64_t k_row, const char *v, int64_t v_row,
                         char *keys, char *values, const int64_t *slots) {
    for (int64_t t = 0; t < tokens; t++)
        if (slots[t] >= 0) {
            memcpy(keys + slots[t] * bytes, k + t * k_row, size_t(bytes));
            memcpy(values + slots[t] * bytes, v + t * v_row, size_t(bytes));
        }
}

// x (tokens, width), which is contiguous, through all layers in place. starts: null where every sequence has one new
// token. Returns 0, or 1 where there is no memory.
EXPORT int hasten_stack(int level, int threads, int number, int64_t count, const Layer *layers, const Place *places,
                        int64_t tokens, void *x, const int64_t *slots, int64_t page_size, int64_t sequences,
                        const int64_t *tables, int64_t table_row, const int64_t *starts, const int64_t *lengths) {
    Stack s;
    s.threads = threads, s.tokens = tokens, s.sequences = sequences, s.page_size = page_size, s.table_row = table_row;
    s.slots = slots, s.tables = tables, s.starts = starts, s.lengths = lengths;
    int64_t sizes[4] = {};  // qkv, heads, inner, the widest x
    for (const Layer *l = layers; l < layers + count; l++) {
        const int64_t inner = l->down.columns, heads = l->heads * l->dim, width = l->qkv.columns;
        const int64_t wide = heads > width ? heads : width, own[4] = {l->qkv.rows, heads, inner, inner > wide ? inner : wide};
        for (int i = 0; i < 4; i++) sizes[i] = own[i] > sizes[i] ? own[i] : sizes[i];
    }
    size_t bytes[4] = {0, 0, 0, wide_bytes(tokens, sizes[3])}, all = bytes[3];
    for (int i = 0; i < 3; i++) all += bytes[i] = size_t(tokens * sizes[i] * 4 + 63) / 64 * 64;  // 4: of the widest number
    char *memory = static_cast<char *>(aligned_alloc(64, all));
    if (!memory) return 1;
    s.qkv = memory, s.heads = memory + bytes[0], s.inner = memory + bytes[0] + bytes[1];
    s.wide = reinterpret_cast<float *>(memory + bytes[0] + bytes[1] + bytes[2]);
    for (int64_t i = 0; i < count; i++) CHOOSE(level, number, run_layer, s, layers[i], places[i], x);
    free(memory);
    return 0;
}

// The first of the greatest numbers of each row; -1 where that is not finite, or something in the row is no number.
EXPORT void hasten_likeliest(int level, int number, int64_t rows, int64_t columns, const void *x, int64_t stride,
                             int64_t *best) {
    for (int64_t r = 0; r < rows; r++) best[r] = CHOOSE(level, number, likeliest, x, r * stride, columns);
}
