// Compiled once for each instruction set, behind attention.h: a block of a few new tokens, and the choice behind the last.
//
// Between two products there is only what the calling thread does by itself, so the helpers are still awake at the next.

constexpr Norm NOTHING = {nullptr, nullptr, NO_NORM, 0, 0};

// y = act([norm] x W^T + bias), or residual + scale (x W^T + bias); none of them has gaps, and y may be the residual.
template <class T>
void through(const Stack &s, const Matrix &m, const Norm &before, const T *x, T *y, int act, bool gated, const T *residual,
             float scale) {
    Product p;
    p.rows = m.rows, p.columns = m.columns, p.tokens = s.tokens;
    p.x = x, p.w = m.w, p.bias = m.bias, p.residual = residual, p.y = y;
    p.x_stride = m.columns, p.w_stride = m.stride, p.residual_stride = m.rows;
    p.norm = before, p.act = act, p.gated = gated, p.scale = scale, p.wide = s.wide;
    multiply_all<T>(s.threads, p);
}

// x, rows of `width`, normalised in place.
template <class T> void settle(const Stack &s, const Norm &behind, T *x, int64_t width) {
    if (behind.kind == NO_NORM) return;
    Product p;
    p.columns = width, p.padded = (width + 15) / 16 * 16, p.tokens = s.tokens;
    p.x = x, p.x_stride = width, p.norm = behind, p.wide = s.wide;
    prepare<T>(p);
    for (int64_t t = 0; t < s.tokens; t++)
        for (int64_t i = 0; i < width; i++) narrow(s.wide[t * p.padded + i], x + t * width + i);
}

// The first `turned` numbers of a head, in pairs of neighbours or of halves.
template <class T> void turn(const Layer &l, const float *cos, const float *sin, T *head) {
    const int64_t pairs = l.turned / 2, step = l.neighbours ? 2 : 1, apart = l.neighbours ? 1 : pairs;
    for (int64_t i = 0; i < pairs; i++) {
        const float a = widen(head[i * step]), b = widen(head[i * step + apart]);
        narrow(a * cos[i] - b * sin[i], head + i * step);
        narrow(b * cos[i] + a * sin[i], head + i * step + apart);
    }
}

// Queries and keys turned, keys and values into their slots; a negative one is nowhere.
template <class T> void place(const Stack &s, const Layer &l, const Place &at, T *qkv) {
    const int64_t q = l.heads * l.dim, kv = l.kv_heads * l.dim, pairs = l.turned / 2;
    for (int64_t t = 0; t < s.tokens; t++, qkv += q + 2 * kv) {
        for (int64_t head = 0; at.cos && head < l.heads + l.kv_heads; head++)
            turn<T>(l, at.cos + t * pairs, at.sin + t * pairs, qkv + head * l.dim);
        if (s.slots[t] < 0) continue;
        memcpy(static_cast<T *>(at.keys) + s.slots[t] * kv, qkv + q, size_t(kv) * sizeof(T));
        memcpy(static_cast<T *>(at.values) + s.slots[t] * kv, qkv + q + kv, size_t(kv) * sizeof(T));
    }
}

template <class T> void look_back(const Stack &s, const Layer &l, const Place &at, const T *qkv, T *y) {
    Attend a;
    a.tokens = s.tokens, a.sequences = s.sequences, a.heads = l.heads, a.kv_heads = l.kv_heads, a.dim = l.dim;
    a.q = qkv, a.q_token = l.qkv.rows, a.q_head = l.dim, a.keys = at.keys, a.values = at.values;
    a.page_size = s.page_size, a.tables = s.tables, a.table_row = s.table_row, a.starts = s.starts, a.lengths = s.lengths;
    a.scale = l.scale, a.softcap = l.softcap, a.window = l.window, a.slopes = at.slopes, a.sinks = l.sinks, a.y = y;
    attend_all<T>(s.threads, a);
}

// One block on x, in place. A parallel mlp reads x before attention is added to it.
template <class T> void run_layer(const Stack &s, const Layer &l, const Place &at, void *tokens) {
    T *x = static_cast<T *>(tokens), *qkv = static_cast<T *>(s.qkv), *heads = static_cast<T *>(s.heads);
    T *inner = static_cast<T *>(s.inner);
    const int act = int(l.act);
    if (l.parallel) through<T>(s, l.up, l.before_mlp, x, inner, act, l.gated, nullptr, 1);
    through<T>(s, l.qkv, l.before_attention, x, qkv, NO_ACT, false, nullptr, 1);
    place<T>(s, l, at, qkv);
    look_back<T>(s, l, at, qkv, heads);
    through<T>(s, l.out, NOTHING, heads, x, NO_ACT, false, x, l.residual);
    settle<T>(s, l.behind_attention, x, l.out.rows);
    if (!l.parallel) through<T>(s, l.up, l.before_mlp, x, inner, act, l.gated, nullptr, 1);
    through<T>(s, l.down, NOTHING, inner, x, NO_ACT, false, x, l.residual);
    settle<T>(s, l.behind_mlp, x, l.down.rows);
}

// The place of the first of the greatest of n numbers; -1 where that is not finite, or one of them is no number.
template <class T> int64_t likeliest(const void *from, int64_t offset, int64_t n) {
    const T *x = static_cast<const T *>(from) + offset;
    float most[WIDTH], top = -INFINITY;
    int odd[WIDTH] = {};
    for (int j = 0; j < WIDTH; j++) most[j] = -INFINITY;
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH)
        for (int j = 0; j < WIDTH; j++) {
            const float v = widen(x[i + j]);
            most[j] = v > most[j] ? v : most[j];
            odd[j] |= v != v;
        }
    for (; i < n; i++) {
        const float v = widen(x[i]);
        most[0] = v > most[0] ? v : most[0];
        odd[0] |= v != v;
    }
    for (int j = 0; j < WIDTH; j++) {
        if (odd[j]) return -1;
        top = most[j] > top ? most[j] : top;
    }
    if (std::isinf(top)) return -1;
    for (i = 0; i < n; i++)
        if (widen(x[i]) == top) return i;
    return -1;
}
