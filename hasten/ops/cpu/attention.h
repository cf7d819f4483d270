// Compiled once for each instruction set, behind product.h: attention of new tokens over pages of keys and values.
//
// A task is one new token and one kv head: all heads that share it are answered together, so a key is read once. Keys
// come in blocks that stay in the first-level cache; the softmax is taken on the way, with the greatest score so far.

constexpr int64_t KEYS = 64;       // of a block
constexpr int64_t MOST_DIM = 256;  // numbers of a head
constexpr int64_t QUERIES = 8;     // heads that are answered together

struct State {
    float q[QUERIES][MOST_DIM], y[QUERIES][MOST_DIM], scores[QUERIES][KEYS];
    float peak[QUERIES], total[QUERIES];
};

template <class T> const T *place(const Attend &a, const void *pool, const int64_t *table, int64_t key, int64_t head) {
    const int64_t token = table[key / a.page_size] * a.page_size + key % a.page_size;
    return static_cast<const T *>(pool) + (token * a.kv_heads + head) * a.dim;
}

// Scores of `count` queries for one block of keys, and what they add to `peak`, `total` and `y`.
template <class T>
void take_block(const Attend &a, State &s, const int64_t *table, int64_t first, int64_t keys, int64_t here,
                int64_t kv_head, int64_t head, int64_t count) {
    const T *k[KEYS], *v[KEYS];
    for (int64_t j = 0; j < keys; j++) {
        k[j] = place<T>(a, a.keys, table, first + j, kv_head);
        v[j] = place<T>(a, a.values, table, first + j, kv_head);
    }
    const int64_t n = a.dim, whole = n / WIDTH * WIDTH;
    for (int64_t j = 0; j < keys; j++)
        for (int64_t h = 0; h < count; h++) {
            Lanes dot = none();
            for (int64_t i = 0; i < whole; i += WIDTH) dot = multiply_add(load(k[j] + i), load(s.q[h] + i), dot);
            if (whole < n) dot = multiply_add(load_some(k[j] + whole, n - whole), load(s.q[h] + whole), dot);
            s.scores[h][j] = sum(dot);
        }
    for (int64_t h = 0; h < count; h++) {
        float *p = s.scores[h], peak = s.peak[h], total = 0;
        if (a.softcap > 0)
            for (int64_t j = 0; j < keys; j++) p[j] = a.softcap * tanhf(p[j] / a.softcap);
        if (a.slopes)
            for (int64_t j = 0; j < keys; j++) p[j] += a.slopes[head + h] * float(first + j - here);
        for (int64_t j = 0; j < keys; j++) peak = p[j] > peak ? p[j] : peak;
        for (int64_t j = 0; j < keys; j++) p[j] = power_of_e(p[j] - peak);
        for (int64_t j = 0; j < keys; j++) total += p[j];
        const float before = power_of_e(s.peak[h] - peak);
        s.peak[h] = peak, s.total[h] = s.total[h] * before + total;
        for (int64_t i = 0; i < n; i++) s.y[h][i] *= before;
    }
    for (int64_t i = 0; i < n; i += WIDTH)
        for (int64_t h = 0; h < count; h++) {
            Lanes y = load(s.y[h] + i);
            for (int64_t j = 0; j < keys; j++) {
                const Lanes value = i + WIDTH <= n ? load(v[j] + i) : load_some(v[j] + i, n - i);
                y = multiply_add(fill(s.scores[h][j]), value, y);
            }
            store(s.y[h] + i, y);
        }
}

// The heads `head` on, which share `kv_head`, of one new token at position `here` of its sequence.
template <class T>
void answer(const Attend &a, int64_t token, const int64_t *table, int64_t here, int64_t kv_head, int64_t head,
            int64_t count) {
    State s;
    const T *sinks = static_cast<const T *>(a.sinks);
    for (int64_t h = 0; h < count; h++) {
        const T *q = static_cast<const T *>(a.q) + token * a.q_token + (head + h) * a.q_head;
        for (int64_t i = 0; i < a.dim; i++) s.q[h][i] = widen(q[i]) * a.scale;
        for (int64_t i = a.dim; i < MOST_DIM; i++) s.q[h][i] = 0;
        for (int64_t i = 0; i < MOST_DIM; i++) s.y[h][i] = 0;
        s.peak[h] = sinks ? widen(sinks[head + h]) : -3e38f;
        s.total[h] = sinks ? 1.0f : 0.0f;
    }
    const int64_t low = a.window > 0 && here + 1 > a.window ? here + 1 - a.window : 0;
    for (int64_t key = low; key <= here; key += KEYS) {
        const int64_t keys = here + 1 - key < KEYS ? here + 1 - key : KEYS;
        take_block<T>(a, s, table, key, keys, here, kv_head, head, count);
    }
    for (int64_t h = 0; h < count; h++) {
        T *y = static_cast<T *>(a.y) + (token * a.heads + head + h) * a.dim;
        for (int64_t i = 0; i < a.dim; i++) narrow(s.y[h][i] / s.total[h], y + i);
    }
}

// What each thread does until no tasks are left.
template <class T> void attend(void *arguments) {
    Attend &a = *static_cast<Attend *>(arguments);
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t task; (task = a.next.fetch_add(1)) < a.tokens * a.kv_heads;) {
        const int64_t token = task / a.kv_heads, kv_head = task % a.kv_heads;
        int64_t r = 0;
        while (r < a.sequences && (a.starts ? a.starts[r + 1] : r + 1) <= token) r++;
        if (r == a.sequences || a.lengths[r] <= 0) {  // of no sequence, or of an empty one
            T *y = static_cast<T *>(a.y) + (token * a.heads + kv_head * group) * a.dim;
            for (int64_t i = 0; i < group * a.dim; i++) narrow(0, y + i);
            continue;
        }
        const int64_t here = a.lengths[r] - (a.starts ? a.starts[r + 1] : r + 1) + token;
        for (int64_t h = 0; h < group; h += QUERIES)
            answer<T>(a, token, a.tables + r * a.table_row, here, kv_head, kv_head * group + h,
                      group - h < QUERIES ? group - h : QUERIES);
    }
}
