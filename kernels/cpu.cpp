// The three passes of the Celo2 update on the CPU, on a box of `rows` × `cols` elements whose columns lie together
// (row i begins at i * stride). Plain C++ without torch's headers, so that it compiles in seconds; one compilation
// serves all shapes. The plain-torch twin is celo2_pretrain/optimizer/backends/passes.py, and docs/how_it_works.md says the rule.
//
// "row" and "col" here are axes of the storage: which of them is v_row's is the caller's business. Accumulators are
// float32, bfloat16 (written with stochastic rounding, twin: kernels/rounding.py) or packed in words of 32 bits (twin:
// kernels/packed.py); parameters and gradients float32.
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Arrays of vectors stay in registers only where the loops over them are unrolled.
#define UNROLL _Pragma("GCC unroll 18")

namespace {

constexpr int W = 16, F = 18, H = 8;
typedef float vec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));
typedef uint16_t bf16;  // its bits
typedef uint32_t word;  // four packed accumulators

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

// 16 random bits: a hash of the element's index in the whole tensor and a key.
inline uvec random_bits(int64_t index, uint32_t key) {
    uvec low;
    for (int i = 0; i < W; i++) low[i] = i;
    low += (uint32_t)index;
    const uvec carry = (uvec)(low < (uint32_t)index) & 1u, high = carry + (uint32_t)(index >> 32);
    uvec h = low ^ (high * 0x9E3779B1u) ^ key;
    h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
    h = (h ^ (h >> 13)) * 0xC2B2AE35u;
    return (h ^ (h >> 16)) >> 16;
}
// float32 → bfloat16: add the random bits, and cut off.
inline uvec rounded(vec x, int64_t index, uint32_t key) {
    const uvec h = random_bits(index, key), bits = (uvec)x, finite = (uvec)((bits & 0x7F800000u) != 0x7F800000u);
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
inline vec rsqrt(vec x) {  // of x of at least 1e-8
#ifdef __AVX512F__
    const vec y = (vec)_mm512_rsqrt14_ps((__m512)x);  // 14 bits; a step of Newton's makes it 28
    return y * (1.5f - 0.5f * x * y * y);
#else
    vec y;
    for (int i = 0; i < W; i++) y[i] = __builtin_sqrtf(x[i]);
    return 1.0f / y;
#endif
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

// A field of the word, as in kernels/packed.py; its exponent of the largest binade is `top`, of the smallest `least`.
template <int Shift, int Exponent, int Mantissa, int Top, bool Signed> struct Field {
    static constexpr int magnitude = Exponent + Mantissa, kept = 23 - Mantissa, least = Top - (1 << Exponent) + 2;
    static constexpr uint32_t offset = (uint32_t)(least + 127) << 23, normal = 1u << 23, most = (1u << magnitude) - 1;
    static vec low() { return (vec)(uvec{} + offset); }

    // x over the scale, rounded by 16 bits a draw.
    static uvec encode(vec x, vec scale, uvec draw) {
        const vec inverse = 1.0f / scale, y = Signed ? (vec)((uvec)x & 0x7FFFFFFFu) * inverse : x * inverse * inverse;
        const uvec below = (uvec)(y + low()) - offset, above = (uvec)y - (offset - normal), small = (uvec)(y < low());
        uvec code = (below & small) | (above & ~small);
        code = code > (most << kept) ? uvec{} + (most << kept) : code;
        code = (code + (draw << (kept - 16))) >> kept;
        if (Signed) code |= ((uvec)(x < 0.0f) & (uvec)(code > 0u)) & (1u << magnitude);
        else code |= (uvec)(x > 0.0f) & (uvec)(code == 0u) & 1u;
        return code << Shift;
    }
    static vec decode(uvec words, vec scale) {
        const uvec field = words >> Shift, code = (field & most) << kept, small = (uvec)(code < normal);
        const uvec below = (uvec)((vec)(code + offset) - low()), above = code + (offset - normal);
        const vec x = (vec)((below & small) | (above & ~small)) * scale;
        return Signed ? (vec)((uvec)x | ((field >> magnitude & 1u) << 31)) : x * scale;
    }
};
typedef Field<0, 4, 2, 5, false> V;
typedef Field<6, 3, 4, 2, true> M0;
typedef Field<14, 3, 4, 1, true> M1;
typedef Field<22, 3, 6, 1, true> M2;

// Of packed accumulators: row (rows, 3), col (3, cols).
struct Scales {
    const float *row, *col;
    Scales at(long i, long j) const { return row ? Scales{row + 3 * i, col + j} : *this; }
    template <class N> vec of(int k, long cols, N n) const { return row[k] * load(col + k * cols, n); }
};

template <class T> struct Tensors {
    const float *g, *p;
    const T* m[3];
    const T* v;
    Scales scales;
};

// m0, m1, m2, v at `at`.
template <class T, class N> inline void states(const Tensors<T>& t, long at, const Scales&, long, N n, vec* x) {
    UNROLL for (int k = 0; k < 3; k++) x[k] = load(t.m[k] + at, n);
    x[3] = load(t.v + at, n);
}
template <class N> inline uvec load_words(const word* p, N count) {
    uvec x{};
    std::memcpy(&x, p, count.n * sizeof(word));
    return x;
}
template <class N> inline void unpack(uvec words, const Scales& s, long cols, N n, vec* x) {
    const vec middle = s.of(1, cols, n);
    x[0] = M0::decode(words, s.of(0, cols, n));
    x[1] = M1::decode(words, middle);
    x[2] = M2::decode(words, s.of(2, cols, n));
    x[3] = V::decode(words, middle);
}
template <class N> inline void states(const Tensors<word>& t, long at, const Scales& s, long cols, N n, vec* x) {
    unpack(load_words(t.v + at, n), s, cols, n, x);
}

// The elementwise features at row i and column j, in ascending order of their index.
template <class T, class N>
inline void features(const Tensors<T>& t, long i, long j, long stride, const float* row_factor, const float* col_factor,
                     long cols, N n, vec* x) {
    const long at = i * stride + j;
    vec state[4];
    states(t, at, t.scales.at(i, j), cols, n, state);
    row_factor += 3 * i;
    col_factor += j;
    const vec g = clamp(load(t.g + at, n), 1000.0f), v = state[3], inverse = rsqrt(v + 1e-8f);
    x[0] = g;
    x[1] = clamp(g, 0.1f);
    x[2] = load(t.p + at, n);
    x[6] = v;
    x[10] = inverse;
    x[14] = g * inverse;
    UNROLL for (int k = 0; k < 3; k++) {
        const vec m = state[k], factor = row_factor[k] * load(col_factor + k * cols, n);
        x[3 + k] = m;
        x[7 + k] = m * inverse;
        x[11 + k] = g * factor;
        x[15 + k] = m * factor;
    }
}

// 1 − β in float32, as the reference has it.
const float decay[3] = {0.9f, 0.99f, 0.999f}, one_minus_decay[3] = {1 - decay[0], 1 - decay[1], 1 - decay[2]};
const float rms_decay = 0.95f, one_minus_rms_decay = 0.05f;

template <class T, class N>
inline void update(T* const* m, T* v, vec g, long at, N n, int64_t index, const uint32_t* keys) {
    UNROLL for (int k = 0; k < 3; k++)
        store(m[k] + at, load(m[k] + at, n) * decay[k] + g * one_minus_decay[k], n, index + at, keys[k]);
    store(v + at, load(v + at, n) * rms_decay + g * g * one_minus_rms_decay, n, index + at, keys[3]);
}
template <class N> inline void update(word* const*, word*, vec, long, N, int64_t, const uint32_t*) {}  // repack does it

template <class T>
void accumulate(const float* g, T* m0, T* m1, T* m2, T* v, long rows, long cols, long stride, float* row_sum,
                float* col_sum, int64_t index, const uint32_t* keys) {
    T* m[3] = {m0, m1, m2};
    for (long i = 0; i < rows; i++) {
        vec total{};
        along(cols, [&](long j, auto n) {
            const long at = i * stride + j;
            const vec x = clamp(load(g + at, n), 1000.0f), square = x * x, s = square + 1e-30f;
            update(m, v, x, at, n, index, keys);
            store(col_sum + j, load(col_sum + j, n) + s, n);
            if (n.n == W) total += s;
            else
                for (int l = 0; l < n.n; l++) total[l] += s[l];
        });
        row_sum[i] += sum(total);
    }
}

void repack(const float* g, word* words, long rows, long cols, long stride, Scales old, Scales now, int64_t index,
            const uint32_t* keys) {
    for (long i = 0; i < rows; i++) {
        along(cols, [&](long j, auto n) {
            const long at = i * stride + j;
            const vec x = clamp(load(g + at, n), 1000.0f);
            const Scales next = now.at(i, j);
            vec state[4];
            unpack(load_words(words + at, n), old.at(i, j), cols, n, state);
            UNROLL for (int k = 0; k < 3; k++) state[k] = state[k] * decay[k] + x * one_minus_decay[k];
            state[3] = state[3] * rms_decay + x * x * one_minus_rms_decay;
            uvec draw[4];
            UNROLL for (int k = 0; k < 4; k++) draw[k] = (random_bits(index + at, keys[k]) + keys[4]) & 0xFFFFu;
            const vec middle = next.of(1, cols, n);
            const vec fast = next.of(0, cols, n), slow = next.of(2, cols, n);
            const uvec made = M0::encode(state[0], fast, draw[0]) | M1::encode(state[1], middle, draw[1]) |
                              M2::encode(state[2], slow, draw[2]) | V::encode(state[3], middle, draw[3]);
            std::memcpy(words + at, &made, n.n * sizeof(word));
        });
    }
}

template <class T>
void norms(const Tensors<T>& t, long rows, long cols, long stride, const float* row_factor, const float* col_factor,
           double* squares) {
    for (long i = 0; i < rows; i++) {
        vec total[F] = {};
        along(cols, [&](long j, auto n) {
            vec x[F];
            features(t, i, j, stride, row_factor, col_factor, cols, n, x);
            if (n.n == W)
                UNROLL for (int f = 0; f < F; f++) total[f] += x[f] * x[f];
            else
                UNROLL for (int f = 0; f < F; f++) total[f] += x[f] * x[f] * mask(n);
        });
        UNROLL for (int f = 0; f < F; f++) squares[f] += sum(total[f]);
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
            features(t, i, j, stride, row_factor, col_factor, cols, n, x);
            UNROLL for (int k = 0; k < H; k++) h[k] = bias[k] + load(col_bias + k * cols + j, n);
            UNROLL for (int f = 0; f < F; f++)
                UNROLL for (int k = 0; k < H; k++) h[k] += x[f] * w0[f * H + k];
            UNROLL for (int k = 0; k < H; k++) h[k] = h[k] > 0.0f ? h[k] : vec{};
            UNROLL for (int k = 0; k < H; k++) {
                vec y = all(b1[k]);
                UNROLL for (int l = 0; l < H; l++) y += h[l] * w1[l * H + k];
                made += (y > 0.0f ? y : vec{}) * w2[k];
            }
            store(out + i * stride + j, made, n);
        });
    }
}

}  // namespace

// Each entry for float32 (…_f32), bfloat16 (…_bf16) and packed (…_packed) accumulators m0, m1, m2, v; packed, all four
// are the same words, and pass A leaves them alone.
//
// celo2_accumulate  Pass A. Updates m and v in place; row_sum (rows) and col_sum (cols) gain the sums of g² + 1e-30.
//                   index: of the box's first element in the whole tensor; keys (4): for rounding m0, m1, m2, v.
// celo2_repack      Updates packed accumulators in place. Read by the scales old_row (rows, 3), old_col (3, cols),
//                   written by the new ones; keys (5): and the step's offset.
// celo2_norms       Pass B. squares (18) gains the sums of squares of the elementwise features.
//                   row_factor (rows, 3); col_factor (3, cols); row_scale, col_scale alike, or null.
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
                                       const T* v, long rows, long cols, long stride, const float* row_scale,        \
                                       const float* col_scale, const float* row_factor, const float* col_factor,     \
                                       double* squares) {                                                            \
        norms<T>({g, p, {m0, m1, m2}, v, {row_scale, col_scale}}, rows, cols, stride, row_factor, col_factor,        \
                 squares);                                                                                           \
    }                                                                                                                \
    extern "C" void celo2_direction_##NAME(const float* g, const float* p, const T* m0, const T* m1, const T* m2,    \
                                           const T* v, float* out, long rows, long cols, long stride,                \
                                           const float* row_scale, const float* col_scale, const float* row_factor,  \
                                           const float* col_factor, const float* w0, const float* row_bias,          \
                                           const float* col_bias, const float* w1, const float* b1, const float* w2, \
                                           float b2) {                                                               \
        direction<T>({g, p, {m0, m1, m2}, v, {row_scale, col_scale}}, out, rows, cols, stride, row_factor,           \
                     col_factor, w0, row_bias, col_bias, w1, b1, w2, b2);                                            \
    }

CELO2_ENTRIES(float, f32)
CELO2_ENTRIES(bf16, bf16)
CELO2_ENTRIES(word, packed)

extern "C" void celo2_repack(const float* g, word* words, long rows, long cols, long stride, const float* old_row,
                             const float* old_col, const float* new_row, const float* new_col, int64_t index,
                             const uint32_t* keys) {
    repack(g, words, rows, cols, stride, {old_row, old_col}, {new_row, new_col}, index, keys);
}
