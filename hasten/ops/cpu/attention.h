// Compiled once for each instruction set, behind product.h: attention of new tokens over pages of keys and values.
//
// A task is one new token and a few heads that lie side by side, whether they share keys or not, so that the numbers of
// a key that it reads are one piece of memory. Keys come in blocks; the softmax is taken on the way, with the greatest
// score so far. Every line of a block's values is asked for before its scores are worked out, and so is the next
// block's keys: from key to key is too far a step for the processor's own prefetchers.

constexpr int64_t KEYS = 32;       // of a block
constexpr int64_t MOST_DIM = 256;  // numbers of a head

struct State {
    float q[HEADS][MOST_DIM], y[HEADS][MOST_DIM], scores[HEADS][KEYS];
    float peak[HEADS], total[HEADS];
    int64_t kv[HEADS];  // where a head's keys begin among a token's
};

// The tokens of a sequence one behind the other, as offsets in a pool. A division costs more than what is done with a
// key, so there is one at the start only.
struct Walk {
    const int64_t *table;
    int64_t page_size, row, page, at;

    Walk(const Attend &a, const int64_t *pages, int64_t key)
        : table(pages), page_size(a.page_size), row(a.kv_heads * a.dim), page(key / page_size), at(key % page_size) {}

    int64_t next() {
        const int64_t offset = (table[page] * page_size + at) * row;
        if (++at == page_size) at = 0, page++;
        return offset;
    }
};

template <class T> inline void ask_for(const T *first, const T *last) {
    for (; first < last; first += 64 / sizeof(T)) __builtin_prefetch(first);
}

// Scores of `count` heads for one block of keys, and what they add to `peak`, `total` and `y`.
template <class T>
void take_block(const Attend &a, State &s, const int64_t *table, int64_t first, int64_t keys, int64_t here, int64_t head,
                int64_t count) {
    const int64_t n = a.dim, whole = n / WIDTH * WIDTH, low = s.kv[0], high = s.kv[count - 1] + n;
    const T *k[KEYS], *v[KEYS];
    Walk walk(a, table, first);
    for (int64_t j = 0; j < keys; j++) {
        const int64_t offset = walk.next();
        k[j] = static_cast<const T *>(a.keys) + offset, v[j] = static_cast<const T *>(a.values) + offset;
        ask_for(v[j] + low, v[j] + high);
    }
    for (int64_t key = first + KEYS; key <= here && key < first + 2 * KEYS; key++) {
        const T *next = static_cast<const T *>(a.keys) + walk.next();
        ask_for(next + low, next + high);
    }
    for (int64_t j = 0; j < keys; j++)
        for (int64_t h = 0; h < count; h++) {
            const T *key = k[j] + s.kv[h];
            Lanes dot = none();
            for (int64_t i = 0; i < whole; i += WIDTH) dot = multiply_add(load(key + i), load(s.q[h] + i), dot);
            if (whole < n) dot = multiply_add(load_some(key + whole, n - whole), load(s.q[h] + whole), dot);
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
        for (int64_t i = 0; i < n; i += WIDTH) {
            Lanes y = multiply_add(load(s.y[h] + i), fill(before), none());
            for (int64_t j = 0; j < keys; j++) {
                const T *value = v[j] + s.kv[h] + i;
                y = multiply_add(fill(p[j]), i < whole ? load(value) : load_some(value, n - i), y);
            }
            store(s.y[h] + i, y);
        }
    }
}

// The heads `head` on of one new token, which is at position `here` of its sequence.
template <class T>
void answer(const Attend &a, int64_t token, const int64_t *table, int64_t here, int64_t head, int64_t count) {
    State s;
    const int64_t padded = (a.dim + WIDTH - 1) / WIDTH * WIDTH;
    const T *sinks = static_cast<const T *>(a.sinks);
    for (int64_t h = 0; h < count; h++) {
        const T *q = static_cast<const T *>(a.q) + token * a.q_token + (head + h) * a.q_head;
        for (int64_t i = 0; i < a.dim; i++) s.q[h][i] = widen(q[i]) * a.scale;
        for (int64_t i = a.dim; i < padded; i++) s.q[h][i] = 0;
        for (int64_t i = 0; i < padded; i++) s.y[h][i] = 0;
        s.peak[h] = sinks ? widen(sinks[head + h]) : -3e38f;
        s.total[h] = sinks ? 1.0f : 0.0f;
        s.kv[h] = (head + h) / (a.heads / a.kv_heads) * a.dim;
    }
    const int64_t low = a.window > 0 && here + 1 > a.window ? here + 1 - a.window : 0;
    for (int64_t key = low; key <= here; key += KEYS)
        take_block<T>(a, s, table, key, here + 1 - key < KEYS ? here + 1 - key : KEYS, here, head, count);
    for (int64_t h = 0; h < count; h++) {
        T *y = static_cast<T *>(a.y) + (token * a.heads + head + h) * a.dim;
        for (int64_t i = 0; i < a.dim; i++) narrow(s.y[h][i] / s.total[h], y + i);
    }
}

// What each thread does until no tasks are left.
template <class T> void attend(void *arguments) {
    Attend &a = *static_cast<Attend *>(arguments);
    const int64_t pieces = (a.heads + a.together - 1) / a.together;
    for (int64_t task; (task = a.next.fetch_add(1)) < a.tokens * pieces;) {
        const int64_t token = task / pieces, head = task % pieces * a.together;
        const int64_t count = a.heads - head < a.together ? a.heads - head : a.together;
        int64_t r = 0;
        while (r < a.sequences && (a.starts ? a.starts[r + 1] : r + 1) <= token) r++;
        if (r == a.sequences || a.lengths[r] <= 0) {  // of no sequence, or of an empty one
            T *y = static_cast<T *>(a.y) + (token * a.heads + head) * a.dim;
            for (int64_t i = 0; i < count * a.dim; i++) narrow(0, y + i);
            continue;
        }
        const int64_t here = a.lengths[r] - (a.starts ? a.starts[r + 1] : r + 1) + token;
        answer<T>(a, token, a.tables + r * a.table_row, here, head, count);
    }
}

template <class T> void attend_all(int threads, Attend &a) {
    const int64_t each = (a.tokens * a.heads + threads - 1) / threads;
    a.together = each < 1 ? 1 : each > HEADS ? HEADS : each;
    share(threads, attend<T>, &a);
}
