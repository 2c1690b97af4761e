// The three passes of the Celo2 update on the CPU, on a box of `rows` × `cols` elements whose columns lie together
// (row i begins at i * stride). Plain C++ without torch's headers, so that it compiles in seconds; one compilation
// serves all shapes. The plain-torch twin is celo2_pretrain/optimizer/passes.py, and DESIGN section 1 the source.
//
// "row" and "col" here are axes of the storage: which of them is v_row's is the caller's business. Accumulators are
// float32 or bfloat16 (written with stochastic rounding, twin: kernels/rounding.py); parameters and gradients float32.
#include <cstdint>
#include <cstring>

namespace {

constexpr int W = 16, F = 18, H = 8;
typedef float vec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));
typedef uint16_t bf16;  // its bits

struct Full { static constexpr int n = W; };  // how many of the W elements count
struct Part { int n; };

inline vec all(float x) { return x - vec{}; }

template <class N> inline vec load(const float* p, N count) {
    vec x{};
    std::memcpy(&x, p, count.n * sizeof(float));
    return x;
}
template <class N> inline vec load(const bf16* p, N count) {
    hvec x{};
    std::memcpy(&x, p, count.n * sizeof(bf16));
    return (vec)(__builtin_convertvector(x, uvec) << 16);
}
template <class N> inline void store(float* p, vec x, N count) { std::memcpy(p, &x, count.n * sizeof(float)); }

// float32 → bfloat16: add 16 random bits, a hash of the element's index in the whole tensor and a key, and cut off.
inline uvec rounded(vec x, int64_t index, uint32_t key) {
    uvec low;
    for (int i = 0; i < W; i++) low[i] = i;
    low += (uint32_t)index;
    const uvec carry = (uvec)(low < (uint32_t)index) & 1u, high = carry + (uint32_t)(index >> 32);
    uvec h = low ^ (high * 0x9E3779B1u) ^ key;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    h = (h ^ (h >> 16)) >> 16;
    const uvec bits = (uvec)x, finite = (uvec)((bits & 0x7F800000u) != 0x7F800000u);
    return bits + (h & finite);
}
template <class N> inline void store(float* p, vec x, N count, int64_t, uint32_t) { store(p, x, count); }
template <class N> inline void store(bf16* p, vec x, N count, int64_t index, uint32_t key) {
    const hvec half = __builtin_convertvector(rounded(x, index, key) >> 16, hvec);
    std::memcpy(p, &half, count.n * sizeof(bf16));
}

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

// Calls body(j, Full) for whole vectors of a row and body(j, Part) for its end.
template <class Body> inline void along(long cols, Body body) {
    long j = 0;
    for (; j + W <= cols; j += W) body(j, Full{});
    if (j < cols) body(j, Part{(int)(cols - j)});
}
inline vec mask(Full) { return all(1); }
inline vec mask(Part count) {
    vec x{};
    for (int i = 0; i < count.n; i++) x[i] = 1;
    return x;
}

template <class T> struct Tensors {
    const float *g, *p;
    const T* m[3];
    const T* v;
};

// The elementwise features at `at`, in ascending order of their index.
template <class T, class N>
inline void features(const Tensors<T>& t, long at, const float* row_factor, const float* col_factor, long cols, N n,
                     vec* x) {
    const vec g = clamp(load(t.g + at, n), 1000.0f), v = load(t.v + at, n), inverse = rsqrt(v + 1e-8f);
    x[0] = g;
    x[1] = clamp(g, 0.1f);
    x[2] = load(t.p + at, n);
    x[6] = v;
    x[10] = inverse;
    x[14] = g * inverse;
    for (int k = 0; k < 3; k++) {
        const vec m = load(t.m[k] + at, n), factor = row_factor[k] * load(col_factor + k * cols, n);
        x[3 + k] = m;
        x[7 + k] = m * inverse;
        x[11 + k] = g * factor;
        x[15 + k] = m * factor;
    }
}

template <class T>
void accumulate(const float* g, T* m0, T* m1, T* m2, T* v, long rows, long cols, long stride, float* row_sum,
                float* col_sum, int64_t index, const uint32_t* keys) {
    T* m[3] = {m0, m1, m2};
    // 1 − β in float32, as the reference has it.
    const float decay[3] = {0.9f, 0.99f, 0.999f}, rest[3] = {1 - decay[0], 1 - decay[1], 1 - decay[2]};
    const float rms_decay = 0.95f, rms_rest = 0.05f;
    for (long i = 0; i < rows; i++) {
        vec total{};
        along(cols, [&](long j, auto n) {
            const long at = i * stride + j;
            const vec x = clamp(load(g + at, n), 1000.0f), square = x * x, s = square + 1e-30f;
            for (int k = 0; k < 3; k++)
                store(m[k] + at, load(m[k] + at, n) * decay[k] + x * rest[k], n, index + at, keys[k]);
            store(v + at, load(v + at, n) * rms_decay + square * rms_rest, n, index + at, keys[3]);
            store(col_sum + j, load(col_sum + j, n) + s, n);
            if (n.n == W) total += s;
            else
                for (int l = 0; l < n.n; l++) total[l] += s[l];
        });
        row_sum[i] += sum(total);
    }
}

template <class T>
void norms(const Tensors<T>& t, long rows, long cols, long stride, const float* row_factor, const float* col_factor,
           double* squares) {
    for (long i = 0; i < rows; i++) {
        vec total[F] = {};
        along(cols, [&](long j, auto n) {
            vec x[F];
            features(t, i * stride + j, row_factor + 3 * i, col_factor + j, cols, n, x);
            if (n.n == W)
                for (int f = 0; f < F; f++) total[f] += x[f] * x[f];
            else
                for (int f = 0; f < F; f++) total[f] += x[f] * x[f] * mask(n);
        });
        for (int f = 0; f < F; f++) squares[f] += sum(total[f]);
    }
}

template <class T>
void direction(const Tensors<T>& t, float* out, long rows, long cols, long stride, const float* row_factor,
               const float* col_factor, const float* w0, const float* row_bias, const float* col_bias,
               const float* w1, const float* b1, const float* w2, float b2) {
    for (long i = 0; i < rows; i++) {
        const float* bias = row_bias + H * i;
        along(cols, [&](long j, auto n) {
            vec x[F], h[H], made = all(b2);
            features(t, i * stride + j, row_factor + 3 * i, col_factor + j, cols, n, x);
            for (int k = 0; k < H; k++) h[k] = bias[k] + load(col_bias + k * cols + j, n);
            for (int f = 0; f < F; f++)
                for (int k = 0; k < H; k++) h[k] += x[f] * w0[f * H + k];
            for (int k = 0; k < H; k++) h[k] = h[k] > 0.0f ? h[k] : vec{};
            for (int k = 0; k < H; k++) {
                vec y = all(b1[k]);
                for (int l = 0; l < H; l++) y += h[l] * w1[l * H + k];
                made += (y > 0.0f ? y : vec{}) * w2[k];
            }
            store(out + i * stride + j, made, n);
        });
    }
}

}  // namespace

// Each entry for float32 (…_f32) and bfloat16 (…_bf16) accumulators m0, m1, m2, v.
//
// celo2_accumulate  Pass A. Updates m and v in place; row_sum (rows) and col_sum (cols) gain the sums of g² + 1e-30.
//                   index: of the box's first element in the whole tensor; keys (4): for rounding m0, m1, m2, v.
// celo2_norms       Pass B. squares (18) gains the sums of squares of the elementwise features.
//                   row_factor (rows, 3); col_factor (3, cols).
// celo2_direction   Pass C. out (same place and stride as the tensors) = output 0 of the MLP. w0 (18, 8) with the
//                   normalisation folded in; row_bias (rows, 8) with b0 inside; col_bias (8, cols); w1 (8, 8), b1 (8),
//                   w2 (8), b2: the second layer, and the third's output 0.
#define CELO2_ENTRIES(T, NAME)                                                                                       \
    extern "C" void celo2_accumulate_##NAME(const float* g, T* m0, T* m1, T* m2, T* v, long rows, long cols,         \
                                            long stride, float* row_sum, float* col_sum, int64_t index,             \
                                            const uint32_t* keys) {                                                  \
        accumulate<T>(g, m0, m1, m2, v, rows, cols, stride, row_sum, col_sum, index, keys);                          \
    }                                                                                                                \
    extern "C" void celo2_norms_##NAME(const float* g, const float* p, const T* m0, const T* m1, const T* m2,        \
                                       const T* v, long rows, long cols, long stride, const float* row_factor,       \
                                       const float* col_factor, double* squares) {                                   \
        norms<T>({g, p, {m0, m1, m2}, v}, rows, cols, stride, row_factor, col_factor, squares);                      \
    }                                                                                                                \
    extern "C" void celo2_direction_##NAME(const float* g, const float* p, const T* m0, const T* m1, const T* m2,    \
                                           const T* v, float* out, long rows, long cols, long stride,                \
                                           const float* row_factor, const float* col_factor, const float* w0,        \
                                           const float* row_bias, const float* col_bias, const float* w1,            \
                                           const float* b1, const float* w2, float b2) {                             \
        direction<T>({g, p, {m0, m1, m2}, v}, out, rows, cols, stride, row_factor, col_factor, w0, row_bias,         \
                     col_bias, w1, b1, w2, b2);                                                                      \
    }

CELO2_ENTRIES(float, f32)
CELO2_ENTRIES(bf16, bf16)
