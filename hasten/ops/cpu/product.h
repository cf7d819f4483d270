// Compiled once for each instruction set, inside a namespace that has Lanes of WIDTH floats and their operations.
//
// A product with one row is a stream of weights, so it is as fast as memory lets it be: every thread reads rows of W as
// they lie there, one behind the other, some 96 KiB at a time. No packed copy is wanted, and no prefetching: one stream
// in order is what the processor's own prefetchers serve best (four rows side by side lose a third of the bandwidth).

constexpr int64_t GROUP = 4;         // tokens whose sums are kept in registers at once
constexpr int64_t MOST_ROWS = 256;   // rows of W that one thread takes at a time
constexpr int64_t TOGETHER = 4;      // rows of W that share what was loaded of x, where there is more than one token

template <class T> inline Lanes load_some(const T *p, int64_t count) {
    T part[WIDTH] = {};
    memcpy(part, p, size_t(count) * sizeof(T));
    return load(part);
}

inline Lanes none() { return fill(0); }

// e^x within 2 units of the last place; below float32's normal range it is the least normal number
inline float power_of_e(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.5f ? 88.5f : x;
    const float magic = 12582912.0f;  // a sum with it has the nearest whole number in its last bits
    float whole = x * 1.44269504f + magic, n = whole - magic;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &whole, 4);
    bits = (bits << 23) + 0x3f800000u;
    float scale;
    memcpy(&scale, &bits, 4);
    return y * scale;
}
inline float sigmoid(float x) { return 1.0f / (1.0f + power_of_e(-x)); }

inline void activate(int act, float *y, int64_t n) {
    switch (act) {
    case RELU:
        for (int64_t i = 0; i < n; i++) y[i] = y[i] < 0 ? 0 : y[i];
        break;
    case RELU2:
        for (int64_t i = 0; i < n; i++) y[i] = y[i] < 0 ? 0 : y[i] * y[i];
        break;
    case GELU:
        for (int64_t i = 0; i < n; i++) y[i] = 0.5f * y[i] * erfcf(-0.707106781f * y[i]);
        break;
    case GELU_TANH:  // (1 + tanh u) / 2 is the sigmoid of 2 u
        for (int64_t i = 0; i < n; i++) y[i] *= sigmoid(1.59576912f * (y[i] + 0.044715f * y[i] * y[i] * y[i]));
        break;
    case QUICK_GELU:
        for (int64_t i = 0; i < n; i++) y[i] *= sigmoid(1.702f * y[i]);
        break;
    case SILU:
        for (int64_t i = 0; i < n; i++) y[i] *= sigmoid(y[i]);
        break;
    case TANH:
        for (int64_t i = 0; i < n; i++) y[i] = tanhf(y[i]);
        break;
    }
}

// y, which is padded with zeros, normalised over its first n numbers
template <class T> void normalise(const Product &p, float *y) {
    const int64_t n = p.columns;
    const T *weight = static_cast<const T *>(p.norm.weight), *bias = static_cast<const T *>(p.norm.bias);
    if (p.norm.kind == LAYER) {
        Lanes total = none();
        for (int64_t i = 0; i < p.padded; i += WIDTH) total = add(total, load(y + i));
        const float mean = sum(total) / float(n);
        for (int64_t i = 0; i < n; i++) y[i] -= mean;
    }
    Lanes squares = none();
    for (int64_t i = 0; i < p.padded; i += WIDTH) squares = multiply_add(load(y + i), load(y + i), squares);
    const float factor = 1.0f / sqrtf(sum(squares) / float(n) + p.norm.eps);
    for (int64_t i = 0; i < n; i++) y[i] *= factor * (p.norm.offset + widen(weight[i]));
    if (bias)
        for (int64_t i = 0; i < n; i++) y[i] += widen(bias[i]);
}

// x as float32, normalised if wanted, in padded rows. The calling thread does it alone: it is one row, or a few.
template <class T> void prepare(Product &p) {
    const int64_t n = p.columns;
    for (int64_t t = 0; t < p.tokens; t++) {
        const T *x = static_cast<const T *>(p.x) + t * p.x_stride;
        float *y = p.wide + t * p.padded;
        for (int64_t i = 0; i < n; i++) y[i] = widen(x[i]);
        for (int64_t i = n; i < p.padded; i++) y[i] = 0;
        if (p.norm.kind != NO_NORM) normalise<T>(p, y);
    }
}

// One token: one row of W at a time, in four sums so that no addition waits for the one before it.
template <class T> void one_token(const Product &p, const T *w, int64_t rows, const float *x, float *y) {
    const int64_t n = p.columns, even = n / (4 * WIDTH) * (4 * WIDTH), whole = n / WIDTH * WIDTH;
    for (int64_t r = 0; r < rows; r++, w += p.w_stride) {
        Lanes a = none(), b = a, c = a, d = a;
        int64_t i = 0;
        for (; i < even; i += 4 * WIDTH) {
            a = multiply_add(load(w + i), load(x + i), a);
            b = multiply_add(load(w + i + WIDTH), load(x + i + WIDTH), b);
            c = multiply_add(load(w + i + 2 * WIDTH), load(x + i + 2 * WIDTH), c);
            d = multiply_add(load(w + i + 3 * WIDTH), load(x + i + 3 * WIDTH), d);
        }
        for (; i < whole; i += WIDTH) a = multiply_add(load(w + i), load(x + i), a);
        if (i < n) b = multiply_add(load_some(w + i, n - i), load(x + i), b);
        y[r] = sum(add(add(a, b), add(c, d)));
    }
}

// A few tokens: R rows of W at a time, so that x is read from the first-level cache a quarter as often. The next R rows
// are asked for in the order in which they lie in memory.
template <class T, int M, int R>
void few_tokens(const Product &p, const T *w, int64_t rows, const float *x, float *y) {
    const int64_t n = p.columns, whole = n / WIDTH * WIDTH;
    for (int64_t r = 0; r + R <= rows; r += R, w += R * p.w_stride) {
        Lanes sums[R][M];
        for (int k = 0; k < R; k++)
            for (int m = 0; m < M; m++) sums[k][m] = none();
        const char *next = reinterpret_cast<const char *>(w + R * p.w_stride);
        int64_t i = 0;
        for (; i < whole; i += WIDTH, next += R * WIDTH * sizeof(T)) {
            for (unsigned line = 0; line < R * WIDTH * sizeof(T); line += 64) __builtin_prefetch(next + line);
#pragma GCC unroll 4
            for (int k = 0; k < R; k++) {
                const Lanes v = load(w + k * p.w_stride + i);
#pragma GCC unroll 4
                for (int m = 0; m < M; m++) sums[k][m] = multiply_add(v, load(x + m * p.padded + i), sums[k][m]);
            }
        }
        for (int k = 0; k < R; k++)
            for (int m = 0; m < M; m++) {
                if (i < n) {
                    const Lanes v = load_some(w + k * p.w_stride + i, n - i);
                    sums[k][m] = multiply_add(v, load(x + m * p.padded + i), sums[k][m]);
                }
                y[m * MOST_ROWS + r + k] = sum(sums[k][m]);
            }
    }
    if (R > 1 && rows % R) few_tokens<T, M, 1>(p, w, rows % R, x, y + rows / R * R);
}

template <class T> void multiply(const Product &p, int64_t first, int64_t rows, int64_t token, int64_t m, float *y) {
    const T *w = static_cast<const T *>(p.w) + first * p.w_stride;
    const float *x = p.wide + token * p.padded;
    switch (m) {
    case 1: return one_token<T>(p, w, rows, x, y);
    case 2: return few_tokens<T, 2, TOGETHER>(p, w, rows, x, y);
    case 3: return few_tokens<T, 3, TOGETHER>(p, w, rows, x, y);
    default: return few_tokens<T, 4, TOGETHER>(p, w, rows, x, y);
    }
}

template <class T> void add_bias(const Product &p, int64_t first, int64_t rows, float *y) {
    if (const T *bias = static_cast<const T *>(p.bias))
        for (int64_t i = 0; i < rows; i++) y[i] += widen(bias[first + i]);
}

// What follows the sums of one token, rows `first` on, and the only rounding.
template <class T> void finish(const Product &p, int64_t first, int64_t rows, int64_t token, float *y, float *other) {
    add_bias<T>(p, first, rows, y);
    activate(p.act, y, rows);
    if (p.gated) {
        add_bias<T>(p, p.outputs + first, rows, other);
        for (int64_t i = 0; i < rows; i++) y[i] *= other[i];
    }
    if (p.residual) {
        const T *residual = static_cast<const T *>(p.residual) + token * p.residual_stride + first;
        for (int64_t i = 0; i < rows; i++) y[i] = widen(residual[i]) + p.scale * y[i];
    }
    T *to = static_cast<T *>(p.y) + token * p.outputs + first;
    for (int64_t i = 0; i < rows; i++) narrow(y[i], to + i);
}

// What each thread does until no rows are left.
template <class T> void work(void *product) {
    Product &p = *static_cast<Product *>(product);
    float sums[2][GROUP * MOST_ROWS];
    for (int64_t first; (first = p.next.fetch_add(p.chunk)) < p.outputs;) {
        const int64_t rows = p.outputs - first < p.chunk ? p.outputs - first : p.chunk;
        for (int64_t token = 0; token < p.tokens; token += GROUP) {
            const int64_t m = p.tokens - token < GROUP ? p.tokens - token : GROUP;
            multiply<T>(p, first, rows, token, m, sums[0]);
            if (p.gated) multiply<T>(p, p.outputs + first, rows, token, m, sums[1]);
            for (int64_t k = 0; k < m; k++)
                finish<T>(p, first, rows, token + k, sums[0] + k * MOST_ROWS, sums[1] + k * MOST_ROWS);
        }
    }
}

// The whole product, given all but how it is divided.
template <class T> void multiply_all(int threads, Product &p) {
    // enough weights for the processor to see a stream, and rows that share no line of y with another thread's
    const int64_t rows = (98304 / (p.columns * int64_t(sizeof(T)) + 1) + 15) / 16 * 16;
    p.chunk = rows < 16 ? 16 : rows > MOST_ROWS ? MOST_ROWS : rows;
    p.outputs = p.gated ? p.rows / 2 : p.rows;
    p.padded = (p.columns + 15) / 16 * 16;
    prepare<T>(p);
    share(p.outputs > p.chunk ? threads : 1, work<T>, &p);
}
