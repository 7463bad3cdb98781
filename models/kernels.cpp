// Loops that PyTorch has only in pieces, each in few passes over memory: group norm with SiLU, the transforms of Winograd's
// convolution, and attention with narrow heads. What each computes is written in kernels.py. Images are channels-last,
// (B, H, W, C); numbers T are float32 or bfloat16, statistics and sums are float32 or wider. Channels are taken
// L at a time, as many as a register holds: vectors of two registers cost a compiler two to four times as long.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

using i64 = int64_t;

namespace {

// ------------------------------------------------------------------------------------------------ the numbers of a register

#ifdef __AVX512F__
constexpr i64 L = 16;
#else
constexpr i64 L = 8;
#endif
typedef float lanes __attribute__((vector_size(4 * L)));
typedef int32_t integers __attribute__((vector_size(4 * L)));
typedef uint32_t words __attribute__((vector_size(4 * L)));
typedef uint16_t halves __attribute__((vector_size(2 * L)));

struct bf16 {
    uint16_t bits;
};

inline lanes load(const float* p) {
    lanes x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline lanes load(const bf16* p) {
    halves h;
    std::memcpy(&h, p, sizeof h);
    const words w = __builtin_convertvector(h, words) << 16;
    return (lanes)w;
}
inline void store(float* p, lanes x) { std::memcpy(p, &x, sizeof x); }
inline void store(bf16* p, lanes x) {  // to nearest, ties to even; NaN stays NaN
#ifdef __AVX512BF16__
    const __m256bh h = _mm512_cvtneps_pbh((__m512)x);
#else
    const words w = (words)x, rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    const halves h = __builtin_convertvector((w & 0x7fffffff) > 0x7f800000 ? (w >> 16) | 0x40 : rounded, halves);
#endif
    std::memcpy(p, &h, sizeof h);
}
template <typename T>
inline lanes load(const T* p, i64 n) {  // the first n, then zeros
    if (n >= L) return load(p);
    T some[L] = {};
    std::memcpy(some, p, n * sizeof(T));
    return load(some);
}
template <typename T>
inline void store(T* p, lanes x, i64 n) {
    if (n >= L) return store(p, x);
    T some[L];
    store(some, x);
    std::memcpy(p, some, n * sizeof(T));
}
inline lanes all(float x) { return lanes{} + x; }
inline float total(lanes v) {  // by halves, which stay in registers
    typedef float four __attribute__((vector_size(16)));
    four y[L / 4];
    std::memcpy(y, &v, sizeof v);
    for (i64 n = L / 4; n > 1; n /= 2)
        for (i64 i = 0; i < n / 2; i++) y[i] += y[i + n / 2];
    return (y[0][0] + y[0][1]) + (y[0][2] + y[0][3]);
}

// e^x to 2 units in the last place, between e^-87 and e^88; NaN stays NaN
inline lanes exponential(lanes x) {
    x = x > 88.0f ? all(88.0f) : x;
    x = x < -87.0f ? all(-87.0f) : x;
    const lanes shifted = x * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;  // k to the nearest integer
    const lanes r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    lanes p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (lanes)((__builtin_convertvector(k, integers) + 127) << 23);
}
inline lanes sigmoid(lanes x) { return 1.0f / (1.0f + exponential(-x)); }

// ------------------------------------------------------------------------------------------------ group norm and SiLU

struct Part {  // of an image: some whole groups of channels
    i64 image, first, count;
};

std::vector<Part> parts_of(i64 B, i64 C, i64 groups) {
    i64 pieces = 1;
    while (B * pieces < 8 && groups % (pieces * 2) == 0 && C / (pieces * 2) % L == 0) pieces *= 2;
    std::vector<Part> parts;
    for (i64 b = 0; b < B; b++)
        for (i64 p = 0; p < pieces; p++) parts.push_back({b, p * (C / pieces), C / pieces});
    return parts;
}

struct Channels {  // a number for each, filled up to whole lanes
    std::vector<float> values;
    explicit Channels(i64 n) : values((n + L - 1) / L * L) {}
    Channels(const float* from, i64 n) : Channels(n) { std::copy(from, from + n, values.begin()); }
    float& operator[](i64 c) { return values[c]; }
    lanes at(i64 c) const { return load(values.data() + c); }
    void add(i64 c, lanes x) { store(values.data() + c, at(c) + x); }
};

constexpr i64 RUN = 64;  // pixels that are summed in float32 before the sum goes to a double

template <int N, typename Value>
void sum_of_pixels(i64 start, i64 end, i64 c, float* run, Value value) {  // of N times L channels, in registers
    lanes sum[N] = {};
    for (i64 p = start; p < end; p++)
        for (int j = 0; j < N; j++) sum[j] += value(p, c + j * L);
    for (int j = 0; j < N; j++) store(run + c + j * L, sum[j]);
}

template <typename Value>
void sum_of_groups(i64 P, i64 count, i64 width, std::vector<double>& sums, Value value) {
    std::fill(sums.begin(), sums.end(), 0.0);
    Channels run(count);
    for (i64 start = 0; start < P; start += RUN) {
        const i64 end = std::min(start + RUN, P);
        i64 c = 0;
        for (; c + 4 * L <= count; c += 4 * L) sum_of_pixels<4>(start, end, c, run.values.data(), value);
        for (; c < count; c += L) sum_of_pixels<1>(start, end, c, run.values.data(), value);
        for (size_t g = 0; g < sums.size(); g++)
            for (i64 i = 0; i < width; i++) sums[g] += run[g * width + i];
    }
}

template <typename T, bool silu>
void norm_forward(const T* x, const float* gamma, const float* beta, T* y, float* mean, float* rstd, i64 B, i64 P, i64 C, i64 groups, float eps) {
    const i64 width = C / groups;
    const auto parts = parts_of(B, C, groups);
#pragma omp parallel for schedule(static)
    for (size_t job = 0; job < parts.size(); job++) {
        const i64 b = parts[job].image, first = parts[job].first, count = parts[job].count;
        const T* in = x + b * P * C + first;
        T* out = y + b * P * C + first;
        Channels m(count), scale(count), shift(beta + first, count);
        std::vector<double> sums(count / width);
        sum_of_groups(P, count, width, sums, [&](i64 p, i64 c) { return load(in + p * C + c, count - c); });
        for (i64 c = 0; c < count; c++) m[c] = float(sums[c / width] / double(width * P));
        sum_of_groups(P, count, width, sums, [&](i64 p, i64 c) {
            const lanes d = load(in + p * C + c, count - c) - m.at(c);
            return d * d;
        });
        for (i64 c = 0; c < count; c++) {
            const float r = float(1.0 / std::sqrt(sums[c / width] / double(width * P) + double(eps)));
            scale[c] = r * gamma[first + c];
            mean[b * groups + (first + c) / width] = m[c];
            rstd[b * groups + (first + c) / width] = r;
        }
        for (i64 p = 0; p < P; p++)
            for (i64 c = 0; c < count; c += L) {
                const lanes h = (load(in + p * C + c, count - c) - m.at(c)) * scale.at(c) + shift.at(c);
                store(out + p * C + c, silu ? h * sigmoid(h) : h, count - c);
            }
    }
}

template <typename T, bool silu>
void norm_backward(const T* x, const T* dy, const float* gamma, const float* beta, const float* mean, const float* rstd, T* dx, float* dgamma, float* dbeta, i64 B, i64 P, i64 C, i64 groups) {
    const i64 width = C / groups;
    const auto parts = parts_of(B, C, groups);
#pragma omp parallel for schedule(static)
    for (size_t job = 0; job < parts.size(); job++) {
        const i64 b = parts[job].image, first = parts[job].first, count = parts[job].count;
        const T *in = x + b * P * C + first, *up = dy + b * P * C + first;
        T* down = dx + b * P * C + first;
        Channels m(count), r(count), weight(gamma + first, count), bias(beta + first, count), d_bias(count), d_weight(count);
        for (i64 c = 0; c < count; c++) {
            m[c] = mean[b * groups + (first + c) / width];
            r[c] = rstd[b * groups + (first + c) / width];
        }
        auto slope = [&](i64 p, i64 c, lanes& normal) {  // dL/dh, h the norm's output
            normal = (load(in + p * C + c, count - c) - m.at(c)) * r.at(c);
            const lanes d = load(up + p * C + c, count - c);
            if (!silu) return d;
            const lanes h = normal * weight.at(c) + bias.at(c), s = sigmoid(h);
            return d * s * (1.0f + h * (1.0f - s));
        };
        for (i64 start = 0; start < P; start += RUN) {
            Channels one(count), two(count);
            for (i64 p = start; p < std::min(start + RUN, P); p++)
                for (i64 c = 0; c < count; c += L) {
                    lanes normal;
                    const lanes dh = slope(p, c, normal);
                    one.add(c, dh);
                    two.add(c, dh * normal);
                }
            for (i64 c = 0; c < count; c += L) d_bias.add(c, one.at(c)), d_weight.add(c, two.at(c));
        }
        std::vector<double> of_bias(count / width), of_weight(count / width);
        for (i64 c = 0; c < count; c++) {
            dbeta[b * C + first + c] = d_bias[c], dgamma[b * C + first + c] = d_weight[c];
            of_bias[c / width] += double(weight[c]) * d_bias[c], of_weight[c / width] += double(weight[c]) * d_weight[c];
        }
        for (i64 c = 0; c < count; c++) {  // from here on the means over a group
            d_bias[c] = float(of_bias[c / width] / double(width * P));
            d_weight[c] = float(of_weight[c / width] / double(width * P));
        }
        for (i64 p = 0; p < P; p++)
            for (i64 c = 0; c < count; c += L) {
                lanes normal;
                const lanes dh = slope(p, c, normal);
                store(down + p * C + c, r.at(c) * (weight.at(c) * dh - d_bias.at(c) - normal * d_weight.at(c)), count - c);
            }
    }
}

// ---------------------------------------------------------------------------------------------- Winograd's convolution

constexpr int TURNED[4] = {3, 1, 2, 0};  // G with its columns reversed is G with its rows in this order
inline i64 slot(int i, int j, bool turned) { return turned ? TURNED[i] * 4 + TURNED[j] : i * 4 + j; }

struct Tiles {  // of 2x2 pixels, over B images of H x W
    i64 B, H, W, C, rows, columns, count;
    Tiles(i64 B, i64 H, i64 W, i64 C) : B(B), H(H), W(W), C(C), rows((H + 1) / 2), columns((W + 1) / 2), count(B * rows * columns) {}
    // calls one(tile, top, left, pixel): pixel(row, column) is its place, or none outside the image
    template <typename One>
    void each(One one) const {
#pragma omp parallel for schedule(static)
        for (i64 line = 0; line < B * rows; line++) {
            const i64 b = line / rows;
            auto pixel = [&](i64 y, i64 x) { return y >= 0 && y < H && x >= 0 && x < W ? ((b * H + y) * W + x) * C : i64(-1); };
            for (i64 column = 0; column < columns; column++) one(line * columns + column, 2 * (line % rows), 2 * column, pixel, b);
        }
    }
};

// V = B^T d B
template <typename T>
void tiles_in(const T* x, T* V, i64 B, i64 H, i64 W, i64 C, bool turned) {
    const Tiles tiles(B, H, W, C);
    const std::vector<T> zeros(C);
    tiles.each([&](i64 tile, i64 top, i64 left, auto pixel, i64) {
        const T* d[4][4];
        T* v[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) {
                const i64 at = pixel(top + i - 1, left + j - 1);
                d[i][j] = at < 0 ? zeros.data() : x + at;
                v[i][j] = V + (slot(i, j, turned) * tiles.count + tile) * C;
            }
        for (i64 c = 0; c < C; c += L) {
            const i64 n = C - c;
            lanes e[4][4];
            for (int j = 0; j < 4; j++) {
                const lanes d0 = load(d[0][j] + c, n), d1 = load(d[1][j] + c, n), d2 = load(d[2][j] + c, n), d3 = load(d[3][j] + c, n);
                e[0][j] = d0 - d2, e[1][j] = d1 + d2, e[2][j] = d2 - d1, e[3][j] = d1 - d3;
            }
            for (int i = 0; i < 4; i++) {
                store(v[i][0] + c, e[i][0] - e[i][2], n), store(v[i][1] + c, e[i][1] + e[i][2], n);
                store(v[i][2] + c, e[i][2] - e[i][1], n), store(v[i][3] + c, e[i][1] - e[i][3], n);
            }
        }
    });
}

// Y = A^T M A + shift
template <typename T>
void tiles_out(const T* M, const float* shift, i64 stride, T* y, i64 B, i64 H, i64 W, i64 C, bool turned) {
    const Tiles tiles(B, H, W, C);
    const std::vector<float> zeros(C);
    tiles.each([&](i64 tile, i64 top, i64 left, auto pixel, i64 b) {
        const T* m[4][4];
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 4; j++) m[i][j] = M + (slot(i, j, turned) * tiles.count + tile) * C;
        i64 at[2][2];
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++) at[i][j] = pixel(top + i, left + j);
        const float* add = shift ? shift + b * stride : zeros.data();
        for (i64 c = 0; c < C; c += L) {
            const i64 n = C - c;
            lanes e[2][4];
            for (int j = 0; j < 4; j++) {
                const lanes m1 = load(m[1][j] + c, n), m2 = load(m[2][j] + c, n);
                e[0][j] = load(m[0][j] + c, n) + m1 + m2, e[1][j] = m1 - m2 - load(m[3][j] + c, n);
            }
            for (int i = 0; i < 2; i++) {
                if (at[i][0] >= 0) store(y + at[i][0] + c, e[i][0] + e[i][1] + e[i][2] + load(add + c, n), n);
                if (at[i][1] >= 0) store(y + at[i][1] + c, e[i][1] - e[i][2] - e[i][3] + load(add + c, n), n);
            }
        }
    });
}

// dM = A dY A^T
template <typename T>
void tiles_back(const T* dy, T* dM, i64 B, i64 H, i64 W, i64 C) {
    const Tiles tiles(B, H, W, C);
    const std::vector<T> zeros(C);
    tiles.each([&](i64 tile, i64 top, i64 left, auto pixel, i64) {
        const T* d[2][2];
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 2; j++) {
                const i64 at = pixel(top + i, left + j);
                d[i][j] = at < 0 ? zeros.data() : dy + at;
            }
        T* m = dM + tile * C;
        for (i64 c = 0; c < C; c += L) {
            const i64 n = C - c, next = tiles.count * C;
            lanes e[4][2];
            for (int j = 0; j < 2; j++) {
                const lanes d0 = load(d[0][j] + c, n), d1 = load(d[1][j] + c, n);
                e[0][j] = d0, e[1][j] = d0 + d1, e[2][j] = d0 - d1, e[3][j] = -d1;
            }
            for (int i = 0; i < 4; i++) {
                T* to = m + 4 * i * next + c;
                store(to, e[i][0], n), store(to + next, e[i][0] + e[i][1], n);
                store(to + 2 * next, e[i][0] - e[i][1], n), store(to + 3 * next, -e[i][1], n);
            }
        }
    });
}

// U = G g G^T, of weights (C', 3, 3, C)
template <typename T>
void weight_in(const float* w, T* U, i64 C_out, i64 C_in) {
    const i64 next = C_out * C_in;
#pragma omp parallel for schedule(static)
    for (i64 o = 0; o < C_out; o++)
        for (i64 c = 0; c < C_in; c += L) {
            const i64 n = C_in - c;
            const float* g = w + o * 9 * C_in + c;
            lanes e[4][3];
            for (int j = 0; j < 3; j++) {
                const lanes g0 = load(g + j * C_in, n), g1 = load(g + (3 + j) * C_in, n), g2 = load(g + (6 + j) * C_in, n);
                e[0][j] = g0, e[1][j] = 0.5f * (g0 + g1 + g2), e[2][j] = 0.5f * (g0 - g1 + g2), e[3][j] = g2;
            }
            for (int i = 0; i < 4; i++) {
                T* u = U + 4 * i * next + o * C_in + c;
                store(u, e[i][0], n), store(u + next, 0.5f * (e[i][0] + e[i][1] + e[i][2]), n);
                store(u + 2 * next, 0.5f * (e[i][0] - e[i][1] + e[i][2]), n), store(u + 3 * next, e[i][2], n);
            }
        }
}

// dg = G^T dU G
template <typename T>
void weight_back(const T* dU, float* dw, i64 C_out, i64 C_in) {
    const i64 next = C_out * C_in;
#pragma omp parallel for schedule(static)
    for (i64 o = 0; o < C_out; o++)
        for (i64 c = 0; c < C_in; c += L) {
            const i64 n = C_in - c;
            lanes e[3][4];
            for (int j = 0; j < 4; j++) {
                const T* u = dU + j * next + o * C_in + c;
                const lanes u1 = load(u + 4 * next, n), u2 = load(u + 8 * next, n), half = 0.5f * (u1 + u2);
                e[0][j] = load(u, n) + half, e[1][j] = 0.5f * (u1 - u2), e[2][j] = half + load(u + 12 * next, n);
            }
            for (int i = 0; i < 3; i++) {
                const lanes half = 0.5f * (e[i][1] + e[i][2]);
                float* g = dw + (o * 9 + 3 * i) * C_in + c;
                store(g, e[i][0] + half, n), store(g + C_in, 0.5f * (e[i][1] - e[i][2]), n), store(g + 2 * C_in, half + e[i][3], n);
            }
        }
}

// ------------------------------------------------------------------------------------------- attention of narrow heads

constexpr float NEVER = -3e38f;  // the score of a key that is not there

template <typename T, int D>
struct Head {  // the keys and values of one, L at a time: D by D rows of lanes
    i64 n, blocks;
    std::vector<lanes> keys, values;
    explicit Head(i64 n) : n(n), blocks((n + L - 1) / L), keys(D * blocks), values(D * blocks) {}
    void read(const T* k, const T* v, i64 stride) {
        turn(k, stride, keys.data());
        turn(v, stride, values.data());
    }
    void turn(const T* rows, i64 stride, lanes* to) const {
        for (i64 j = 0; j < n; j++) {
            const lanes row = load(rows + j * stride, D);
            for (int d = 0; d < D; d++) to[j / L * D + d][j % L] = row[d];
        }
    }
    lanes scores(i64 J, const float* query) const {
        lanes s = keys[J * D] * query[0];
        for (int d = 1; d < D; d++) s += keys[J * D + d] * query[d];
        if (J == blocks - 1)
            for (i64 j = n - J * L; j < L; j++) s[j] = NEVER;
        return s;
    }
};

template <typename T, int D>
void attend(const T* q, const T* k, const T* v, T* out, float* lse, i64 B, i64 n, i64 heads) {
    const i64 C = heads * D;
    const float scale = 1.0f / std::sqrt(float(D));
#pragma omp parallel
    {
        Head<T, D> head(n);
        std::vector<lanes> score(head.blocks);
#pragma omp for schedule(static)
        for (i64 job = 0; job < B * heads; job++) {
            const i64 at = job / heads * n * C + job % heads * D;
            head.read(k + at, v + at, C);
            for (i64 i = 0; i < n; i++) {
                float query[L];
                store(query, load(q + at + i * C, D) * scale);
                lanes top = all(NEVER);
                for (i64 J = 0; J < head.blocks; J++) {
                    score[J] = head.scores(J, query);
                    top = score[J] > top ? score[J] : top;
                }
                float largest = top[0];
                for (i64 j = 1; j < L; j++) largest = std::max(largest, top[j]);
                lanes norm = all(0), sum[D] = {};
                for (i64 J = 0; J < head.blocks; J++) {
                    const lanes p = exponential(score[J] - largest);
                    norm += p;
                    for (int d = 0; d < D; d++) sum[d] += p * head.values[J * D + d];
                }
                const float whole = total(norm);
                lse[job * n + i] = largest + std::log(whole);
                lanes mean = all(0);
                for (int d = 0; d < D; d++) mean[d] = total(sum[d]) / whole;
                store(out + at + i * C, mean, D);
            }
        }
    }
}

template <typename T, int D>
void attend_back(const T* q, const T* k, const T* v, const T* out, const float* lse, const T* dout, T* dq, T* dk, T* dv, i64 B, i64 n, i64 heads) {
    const i64 C = heads * D;
    const float scale = 1.0f / std::sqrt(float(D));
#pragma omp parallel
    {
        Head<T, D> head(n), d_head(n);
#pragma omp for schedule(static)
        for (i64 job = 0; job < B * heads; job++) {
            const i64 at = job / heads * n * C + job % heads * D;
            head.read(k + at, v + at, C);
            std::fill(d_head.keys.begin(), d_head.keys.end(), all(0));
            std::fill(d_head.values.begin(), d_head.values.end(), all(0));
            for (i64 i = 0; i < n; i++) {
                float query[L], d_out[L];
                store(query, load(q + at + i * C, D) * scale);
                store(d_out, load(dout + at + i * C, D));
                const float delta = total(load(d_out) * load(out + at + i * C, D)), log_sum = lse[job * n + i];
                lanes d_query[D] = {};
                for (i64 J = 0; J < head.blocks; J++) {
                    const lanes *keys = head.keys.data() + J * D, *values = head.values.data() + J * D;
                    lanes *d_keys = d_head.keys.data() + J * D, *d_values = d_head.values.data() + J * D;
                    const lanes p = exponential(head.scores(J, query) - log_sum);
                    lanes dp = values[0] * d_out[0] - delta;
                    for (int d = 1; d < D; d++) dp += values[d] * d_out[d];
                    const lanes ds = p * dp;
                    for (int d = 0; d < D; d++) {
                        d_query[d] += ds * keys[d];
                        d_keys[d] += ds * query[d];
                        d_values[d] += p * d_out[d];
                    }
                }
                lanes sum = all(0);
                for (int d = 0; d < D; d++) sum[d] = total(d_query[d]) * scale;
                store(dq + at + i * C, sum, D);
            }
            for (i64 j = 0; j < n; j++) {
                lanes d_key = all(0), d_value = all(0);
                for (int d = 0; d < D; d++) d_key[d] = d_head.keys[j / L * D + d][j % L], d_value[d] = d_head.values[j / L * D + d][j % L];
                store(dk + at + j * C, d_key, D), store(dv + at + j * C, d_value, D);
            }
        }
    }
}

}  // namespace

// ------------------------------------------------------------------------ the same under names that have no types

#define WIDTHS(call) \
    if (D == 4) { constexpr int W = 4; call; } \
    if (D == 8) { constexpr int W = 8; call; }

#define BOTH(T, name)                                                                                                    \
    extern "C" void norm_forward_##name(const T* x, const float* gamma, const float* beta, T* y, float* mean,            \
                                        float* rstd, i64 B, i64 P, i64 C, i64 groups, float eps, i64 silu) {             \
        (silu ? norm_forward<T, true> : norm_forward<T, false>)(x, gamma, beta, y, mean, rstd, B, P, C, groups, eps);    \
    }                                                                                                                    \
    extern "C" void norm_backward_##name(const T* x, const T* dy, const float* gamma, const float* beta,                 \
                                         const float* mean, const float* rstd, T* dx, float* dgamma, float* dbeta,       \
                                         i64 B, i64 P, i64 C, i64 groups, i64 silu) {                                    \
        (silu ? norm_backward<T, true> : norm_backward<T, false>)(x, dy, gamma, beta, mean, rstd, dx, dgamma, dbeta, B,  \
                                                                  P, C, groups);                                         \
    }                                                                                                                    \
    extern "C" void tiles_in_##name(const T* x, T* V, i64 B, i64 H, i64 W, i64 C, i64 turned) {                          \
        tiles_in<T>(x, V, B, H, W, C, turned);                                                                           \
    }                                                                                                                    \
    extern "C" void tiles_out_##name(const T* M, const float* shift, i64 stride, T* y, i64 B, i64 H, i64 W, i64 C,       \
                                     i64 turned) {                                                                       \
        tiles_out<T>(M, shift, stride, y, B, H, W, C, turned);                                                           \
    }                                                                                                                    \
    extern "C" void tiles_back_##name(const T* dy, T* dM, i64 B, i64 H, i64 W, i64 C) {                                  \
        tiles_back<T>(dy, dM, B, H, W, C);                                                                               \
    }                                                                                                                    \
    extern "C" void weight_in_##name(const float* w, T* U, i64 C_out, i64 C_in) { weight_in<T>(w, U, C_out, C_in); }     \
    extern "C" void weight_back_##name(const T* dU, float* dw, i64 C_out, i64 C_in) {                                    \
        weight_back<T>(dU, dw, C_out, C_in);                                                                             \
    }                                                                                                                    \
    extern "C" void attend_##name(const T* q, const T* k, const T* v, T* out, float* lse, i64 B, i64 n, i64 heads,       \
                                  i64 D) {                                                                               \
        WIDTHS((attend<T, W>(q, k, v, out, lse, B, n, heads)))                                                           \
    }                                                                                                                    \
    extern "C" void attend_back_##name(const T* q, const T* k, const T* v, const T* out, const float* lse,               \
                                       const T* dout, T* dq, T* dk, T* dv, i64 B, i64 n, i64 heads, i64 D) {             \
        WIDTHS((attend_back<T, W>(q, k, v, out, lse, dout, dq, dk, dv, B, n, heads)))                                    \
    }

BOTH(float, float)
BOTH(bf16, bf16)
