// What one call hands to the threads that share it.

#include <atomic>
#include <cstdint>

namespace {

enum Number { FLOAT32, BFLOAT16, FLOAT16 };
enum Kind { NO_NORM, LAYER, RMS };
constexpr int64_t HEADS = 8;  // the most heads of one task of attention
enum Act { NO_ACT, RELU, RELU2, GELU, GELU_TANH, QUICK_GELU, SILU, TANH };

struct Norm {
    const void *weight, *bias;
    int64_t kind;
    float eps, offset;
};

// y = act([norm] x W^T + bias), or residual + scale (x W^T + bias). gated: act of the first half times the second.
struct Product {
    int64_t rows, columns, tokens;  // W is rows x columns, x is tokens x columns
    const void *x, *w, *bias, *residual;
    void *y;
    int64_t x_stride, w_stride, residual_stride;
    Norm norm;
    int act;
    bool gated;
    float scale;
    float *wide;      // x, normalised, as float32 in rows of `padded`, zeros behind each
    int64_t padded, outputs, chunk;
    std::atomic<int64_t> next{0};
};

// y = softmax(scale q k) v of each new token over what its sequence keeps in pages.
struct Attend {
    int64_t tokens, sequences, heads, kv_heads, dim, page_size, table_row, q_token, q_head, window;  // window 0: all keys
    int64_t together;                                       // heads of a task
    const void *q, *keys, *values, *sinks;
    const int64_t *tables, *starts, *lengths;  // starts: null where every sequence has one new token
    const float *slopes;
    void *y;
    float scale, softcap;  // softcap 0: none
    std::atomic<int64_t> next{0};
};

// A block with its weights; library.py has the same fields. Matrices are rows x columns, rows `stride` numbers apart.
struct Matrix {
    const void *w, *bias;
    int64_t rows, columns, stride;
};
struct Layer {
    Matrix qkv, out, up, down;
    Norm before_attention, behind_attention, before_mlp, behind_mlp;
    const void *sinks;
    int64_t heads, kv_heads, dim, window, turned, neighbours, act, gated, parallel;  // turned: numbers of a head
    float scale, softcap, residual;
};

// What a layer finds in one call: its pools, cos and sin (tokens, turned / 2) and slopes, each null where there are none.
struct Place {
    void *keys, *values;
    const float *cos, *sin, *slopes;
};

// A call of all layers: the new tokens' slots, and what each of them sees, as in Attend.
struct Stack {
    int threads;
    int64_t tokens, sequences, page_size, table_row;
    const int64_t *slots, *tables, *starts, *lengths;
    void *qkv, *heads, *inner;  // rows of one layer
    float *wide;
};

}  // namespace
