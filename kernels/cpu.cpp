// The three passes of the Celo2 update on the CPU, on a box of `rows` × `cols` elements whose columns lie together
// (row i begins at i * stride). Plain C++ without torch's headers, so that it compiles in seconds; one compilation
// serves all shapes. The plain-torch twin is celo2_pretrain/optimizer/passes.py, and DESIGN section 1 the source.
//
// "row" and "col" here are axes of the storage: which of them is v_row's is the caller's business.
#include <cstring>

namespace {

constexpr int W = 16, F = 18, H = 8;
typedef float vec __attribute__((vector_size(4 * W)));

inline vec all(float x) { return x - vec{}; }
inline vec load(const float* p) { vec x; std::memcpy(&x, p, sizeof x); return x; }
inline vec load(const float* p, int n) { vec x{}; std::memcpy(&x, p, n * sizeof(float)); return x; }
inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }
inline void store(float* p, vec x, int n) { std::memcpy(p, &x, n * sizeof(float)); }
inline vec clamp(vec x, float bound) {
    x = x > all(bound) ? all(bound) : x;
    return x < all(-bound) ? all(-bound) : x;
}
inline vec rsqrt(vec x) {
    vec y;
    for (int i = 0; i < W; i++) y[i] = __builtin_sqrtf(x[i]);
    return 1.0f / y;
}
inline float sum(vec x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}

struct Tensors { const float *g, *p, *m0, *m1, *m2, *v; };

// The elementwise features at `at`, in ascending order of their index; n < W at the end of a row.
template <class Load>
inline void features(const Tensors& t, long at, const float* row_factor, const float* col_factor, long col,
                     long cols, Load get, vec* x) {
    vec g = clamp(get(t.g + at), 1000.0f), v = get(t.v + at), inverse = rsqrt(v + 1e-8f);
    vec m[3] = {get(t.m0 + at), get(t.m1 + at), get(t.m2 + at)};
    x[0] = g;
    x[1] = clamp(g, 0.1f);
    x[2] = get(t.p + at);
    x[6] = v;
    x[10] = inverse;
    x[14] = g * inverse;
    for (int k = 0; k < 3; k++) {
        vec factor = row_factor[k] * get(col_factor + k * cols + col);
        x[3 + k] = m[k];
        x[7 + k] = m[k] * inverse;
        x[11 + k] = g * factor;
        x[15 + k] = m[k] * factor;
    }
}

}  // namespace

extern "C" {

// Pass A. Updates m and v in place; row_sum (rows) and col_sum (cols) gain the sums of g² + 1e-30.
void celo2_accumulate(const float* g, float* m0, float* m1, float* m2, float* v, long rows, long cols, long stride,
                      float* row_sum, float* col_sum) {
    float* m[3] = {m0, m1, m2};
    // 1 − β in float32, as the authors have it: 1 − 0.999f is a relative 1.3e-5 less than 0.001.
    const float decay[3] = {0.9f, 0.99f, 0.999f}, rest[3] = {1 - 0.9f, 1 - 0.99f, 1 - 0.999f};
    for (long i = 0; i < rows; i++) {
        vec total{};
        float tail = 0;
        auto step = [&](auto get, auto put, long j) {
            long at = i * stride + j;
            vec x = clamp(get(g + at), 1000.0f), square = x * x;
            for (int k = 0; k < 3; k++) put(m[k] + at, get(m[k] + at) * decay[k] + x * rest[k]);
            put(v + at, get(v + at) * 0.95f + square * 0.05f);
            vec s = square + 1e-30f;
            put(col_sum + j, get(col_sum + j) + s);
            return s;
        };
        long j = 0;
        for (; j + W <= cols; j += W)
            total += step([](const float* p) { return load(p); }, [](float* p, vec x) { store(p, x); }, j);
        if (int n = cols - j) {
            vec s = step([n](const float* p) { return load(p, n); }, [n](float* p, vec x) { store(p, x, n); }, j);
            for (int l = 0; l < n; l++) tail += s[l];
        }
        row_sum[i] += sum(total) + tail;
    }
}

// Pass B. squares (18) gains the sums of squares of the elementwise features.
// row_factor (rows, 3); col_factor (3, cols).
void celo2_norms(const float* g, const float* p, const float* m0, const float* m1, const float* m2, const float* v,
                 long rows, long cols, long stride, const float* row_factor, const float* col_factor,
                 double* squares) {
    const Tensors t{g, p, m0, m1, m2, v};
    for (long i = 0; i < rows; i++) {
        vec total[F] = {}, x[F];
        long j = 0;
        for (; j + W <= cols; j += W) {
            features(t, i * stride + j, row_factor + 3 * i, col_factor, j, cols,
                     [](const float* q) { return load(q); }, x);
            for (int f = 0; f < F; f++) total[f] += x[f] * x[f];
        }
        if (int n = cols - j) {
            vec mask{};
            for (int l = 0; l < n; l++) mask[l] = 1;
            features(t, i * stride + j, row_factor + 3 * i, col_factor, j, cols,
                     [n](const float* q) { return load(q, n); }, x);
            for (int f = 0; f < F; f++) total[f] += x[f] * x[f] * mask;
        }
        for (int f = 0; f < F; f++) squares[f] += sum(total[f]);
    }
}

// Pass C. out (same place and stride as the tensors) = output 0 of the MLP.
// w0 (18, 8) with the normalisation folded in; row_bias (rows, 8) with b0 inside; col_bias (8, cols);
// w1 (8, 8), b1 (8), w2 (8), b2: the second and third layer, the latter's output 0 alone.
void celo2_direction(const float* g, const float* p, const float* m0, const float* m1, const float* m2,
                     const float* v, float* out, long rows, long cols, long stride, const float* row_factor,
                     const float* col_factor, const float* w0, const float* row_bias, const float* col_bias,
                     const float* w1, const float* b1, const float* w2, float b2) {
    const Tensors t{g, p, m0, m1, m2, v};
    for (long i = 0; i < rows; i++) {
        const float* bias = row_bias + H * i;
        auto step = [&](auto get, auto put, long j) {
            vec x[F], h[H], out_h = all(b2);
            features(t, i * stride + j, row_factor + 3 * i, col_factor, j, cols, get, x);
            for (int k = 0; k < H; k++) h[k] = bias[k] + get(col_bias + k * cols + j);
            for (int f = 0; f < F; f++)
                for (int k = 0; k < H; k++) h[k] += x[f] * w0[f * H + k];
            for (int k = 0; k < H; k++) h[k] = h[k] > 0.0f ? h[k] : vec{};
            for (int k = 0; k < H; k++) {
                vec y = all(b1[k]);
                for (int l = 0; l < H; l++) y += h[l] * w1[l * H + k];
                out_h += (y > 0.0f ? y : vec{}) * w2[k];
            }
            put(out + i * stride + j, out_h);
        };
        long j = 0;
        for (; j + W <= cols; j += W)
            step([](const float* q) { return load(q); }, [](float* q, vec x) { store(q, x); }, j);
        if (int n = cols - j)
            step([n](const float* q) { return load(q, n); }, [n](float* q, vec x) { store(q, x, n); }, j);
    }
}

}  // extern "C"
