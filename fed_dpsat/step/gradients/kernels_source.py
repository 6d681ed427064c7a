"""The C source of the kernels that ``compiled`` compiles; a string, because bundles of Flower hold no C files."""

SOURCE = r"""
/* Per-example gradients where libraries have none: weights of convolutions, and the norm layers between them.
 *
 * Images have their channels last: x[B][H][W][C]. Every function works on one example at a time, whose image stays in
 * the cache, and gives the same bits for an example whatever the others are. Sums are of float products, added up in
 * short runs, and runs in one another. Compiled for the machine that runs it: see compiled.py.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

typedef ptrdiff_t size;

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float one;
typedef float four __attribute__((vector_size(16), aligned(4)));
typedef float wide __attribute__((vector_size(4 * LANES), aligned(4)));

#define UNROLL _Pragma("GCC unroll 32")
#define LANES_OF(V) ((size)(sizeof(V) / sizeof(float)))

enum { NEAR_BYTES = 40000, RUN = 64, FEW_CHANNELS = 8 };

/* What tiles share: a block of outputs, and where the inputs of one place of the kernel lie. */
typedef struct {
    size lines, columns, input_line, input_step, output_line, output_step, row;
} block;

/* acc[c * row + o] += sum over the block of x[c] g[o], for C inputs c and O vectors of outputs o, kept in registers. */
#define TILE(V, C, O)                                                                                                  \
    static void V##_##C##_##O(const float *restrict x, const float *restrict g, float *restrict acc, const block *b) { \
        V sum[C][O];                                                                                                   \
        UNROLL for (int c = 0; c < C; c++) UNROLL for (int o = 0; o < O; o++) sum[c][o] = (V){0};                      \
        for (size i = 0; i < b->lines; i++) {                                                                          \
            const float *in = x + i * b->input_line, *out = g + i * b->output_line;                                    \
            for (size j = 0; j < b->columns; j++, in += b->input_step, out += b->output_step) {                        \
                V slope[O];                                                                                            \
                UNROLL for (int o = 0; o < O; o++) slope[o] = *(const V *)(out + o * LANES_OF(V));                     \
                UNROLL for (int c = 0; c < C; c++)                                                                     \
                    UNROLL for (int o = 0; o < O; o++) sum[c][o] += in[c] * slope[o];                                  \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int c = 0; c < C; c++)                                                                             \
            UNROLL for (int o = 0; o < O; o++) *(V *)(acc + c * b->row + o * LANES_OF(V)) += sum[c][o];                \
    }

typedef void tile(const float *restrict, const float *restrict, float *restrict, const block *);
typedef struct {
    size inputs;
    tile *run;
} choice;

/* As many sums as the registers hold: 32 of them, or 16 of AVX2. */
TILE(one, 1, 1) TILE(one, 4, 1) TILE(four, 1, 1) TILE(four, 4, 1) TILE(four, 8, 1)
TILE(wide, 1, 1) TILE(wide, 2, 1) TILE(wide, 3, 1) TILE(wide, 4, 1) TILE(wide, 8, 1)
TILE(wide, 1, 2) TILE(wide, 2, 2) TILE(wide, 3, 2) TILE(wide, 4, 2) TILE(wide, 6, 2)
static const choice ONE[] = {{4, one_4_1}, {1, one_1_1}};
static const choice FOUR[] = {{8, four_8_1}, {4, four_4_1}, {1, four_1_1}};
#if LANES == 8
TILE(wide, 12, 1)
static const choice WIDE[] = {{12, wide_12_1}, {8, wide_8_1}, {4, wide_4_1}, {3, wide_3_1}, {2, wide_2_1},
                              {1, wide_1_1}};
static const choice WIDE_2[] = {{6, wide_6_2}, {4, wide_4_2}, {3, wide_3_2}, {2, wide_2_2}, {1, wide_1_2}};
#else
TILE(wide, 16, 1) TILE(wide, 24, 1) TILE(wide, 8, 2) TILE(wide, 12, 2)
TILE(wide, 1, 4) TILE(wide, 2, 4) TILE(wide, 3, 4) TILE(wide, 4, 4) TILE(wide, 6, 4)
static const choice WIDE[] = {{24, wide_24_1}, {16, wide_16_1}, {8, wide_8_1}, {4, wide_4_1}, {3, wide_3_1},
                              {2, wide_2_1}, {1, wide_1_1}};
static const choice WIDE_2[] = {{12, wide_12_2}, {8, wide_8_2}, {6, wide_6_2}, {4, wide_4_2}, {3, wide_3_2},
                                {2, wide_2_2}, {1, wide_1_2}};
static const choice WIDE_4[] = {{6, wide_6_4}, {4, wide_4_4}, {3, wide_3_4}, {2, wide_2_4}, {1, wide_1_4}};
#endif

/* acc[o] += sum over the block of x[o] g[o]: every output has an input of its own (depthwise convolutions). */
#define PAIRS(V, O)                                                                                                    \
    static void pairs_##V##_##O(const float *restrict x, const float *restrict g, float *restrict acc,                 \
                                const block *b) {                                                                      \
        V sum[O] = {0};                                                                                                \
        for (size i = 0; i < b->lines; i++) {                                                                          \
            const float *in = x + i * b->input_line, *out = g + i * b->output_line;                                    \
            for (size j = 0; j < b->columns; j++, in += b->input_step, out += b->output_step)                          \
                UNROLL for (int o = 0; o < O; o++)                                                                     \
                    sum[o] += *(const V *)(in + o * LANES_OF(V)) * *(const V *)(out + o * LANES_OF(V));                \
        }                                                                                                              \
        UNROLL for (int o = 0; o < O; o++) *(V *)(acc + o * LANES_OF(V)) += sum[o];                                    \
    }
PAIRS(one, 1) PAIRS(wide, 1) PAIRS(wide, 4)
static const choice PAIRS_ONE[] = {{1, pairs_one_1}}, PAIRS_WIDE[] = {{1, pairs_wide_1}},
                    PAIRS_WIDE_4[] = {{1, pairs_wide_4}};

static const choice *tiles(size outputs, int depthwise, size *width) {
    if (depthwise) {
        if (outputs >= 4 * LANES) return *width = 4 * LANES, PAIRS_WIDE_4;
        if (outputs >= LANES) return *width = LANES, PAIRS_WIDE;
        return *width = 1, PAIRS_ONE;
    }
#if LANES != 8
    if (outputs >= 4 * LANES) return *width = 4 * LANES, WIDE_4;
#endif
    if (outputs >= 2 * LANES) return *width = 2 * LANES, WIDE_2;
    if (outputs >= LANES) return *width = LANES, WIDE;
    if (outputs >= 4) return *width = 4, FOUR;
    return *width = 1, ONE;
}

/* The next of `left` inputs: tiles of about the same size, none larger than the first choice. */
static const choice *next(const choice *all, size left) {
    size count = (left + all->inputs - 1) / all->inputs, each = (left + count - 1) / count;
    while (all->inputs > each) all++;
    return all;
}

typedef struct {
    size height, width, channels, lines, columns, outputs;
    size high, wide, down, across, above, before, apart_down, apart_across, depthwise;
} geometry;

static size inputs_of_one(const geometry *s) { return s->depthwise ? 1 : s->channels; }

/* first and last + 1 of the outputs [from, to) whose input, `shift` further, lies inside of `length` */
static void within(size *from, size *to, size step, size shift, size length) {
    while (*from < *to && *from * step + shift < 0) ++*from;
    while (*to > *from && (*to - 1) * step + shift >= length) --*to;
}

/* Columns [left, right) of the outputs from the line `top` on, and `taps` places of the kernel side by side from (i, j)
   on: their inputs lie side by side too, and so do their rows. */
static void add(const float *x, const float *g, float *rows, const geometry *s, block *b, size top, size left,
                size right, size i, size j, size taps) {
    size inputs = inputs_of_one(s), y = top * s->down + i * s->apart_down - s->above, width;
    if (left >= right) return;
    b->columns = right - left;
    x += (y * s->width + left * s->across + j * s->apart_across - s->before) * s->channels;
    g += (top * s->columns + left) * s->outputs;
    rows += (i * s->wide + j) * inputs * s->outputs;
    for (size o = 0; o < s->outputs; o += width) {
        const choice *all = tiles(s->outputs - o, s->depthwise, &width), *best;
        for (size c = 0; c < taps * inputs; c += best->inputs) {
            best = next(all, taps * inputs - c);
            best->run(x + (s->depthwise ? o : c), g + o, rows + c * s->outputs + o, b);
        }
    }
}

static void weights_of_one(const float *x, const float *g, float *rows, const geometry *s) {
    size line_bytes = sizeof(float) * (s->width * s->channels * s->down + s->columns * s->outputs);
    size few = line_bytes < NEAR_BYTES ? NEAR_BYTES / line_bytes : 1;
    int together = s->channels < FEW_CHANNELS && s->apart_across == 1 && !s->depthwise;
    size first = 0, last = together ? s->columns : 0; /* columns whose inputs are all inside */
    within(&first, &last, s->across, -s->before, s->width);
    within(&first, &last, s->across, s->wide - 1 - s->before, s->width);
    memset(rows, 0, sizeof(float) * s->high * s->wide * inputs_of_one(s) * s->outputs);
    block b = {.input_line = s->down * s->width * s->channels,
               .input_step = s->across * s->channels,
               .output_line = s->columns * s->outputs,
               .output_step = s->outputs,
               .row = s->outputs};
    for (size start = 0; start < s->lines; start += few)
        for (size i = 0; i < s->high; i++) {
            size top = start, bottom = start + few < s->lines ? start + few : s->lines;
            within(&top, &bottom, s->down, i * s->apart_down - s->above, s->height);
            if (!(b.lines = bottom - top)) continue;
            add(x, g, rows, s, &b, top, first, last, i, 0, s->wide);
            for (size j = 0; j < s->wide; j++) {
                size left = 0, right = s->columns;
                within(&left, &right, s->across, j * s->apart_across - s->before, s->width);
                add(x, g, rows, s, &b, top, left, first < last ? first : right, i, j, 1);
                if (first < last) add(x, g, rows, s, &b, top, last, right, i, j, 1);
            }
        }
}

/* Of rows[count][outputs], by output: squares, and where there are filters[count][outputs] sums and products with
   them. */
static void summary(const float *rows, const float *filters, size count, size outputs, double *squares, double *sums,
                    double *along) {
    memset(squares, 0, sizeof(double) * outputs);
    if (filters) memset(sums, 0, sizeof(double) * outputs), memset(along, 0, sizeof(double) * outputs);
    for (size o = 0; o < outputs; o += LANES) {
        size few = outputs - o < LANES ? outputs - o : LANES;
        double square[LANES] = {0}, sum[LANES] = {0}, product[LANES] = {0};
        for (size i = 0; i < count; i++) {
            const float *row = rows + i * outputs + o, *filter = filters + i * outputs + o;
            if (few == LANES && !filters)
                for (size k = 0; k < LANES; k++) square[k] += (double)row[k] * row[k];
            else
                for (size k = 0; k < few; k++) {
                    square[k] += (double)row[k] * row[k];
                    if (filters) sum[k] += row[k], product[k] += (double)row[k] * filter[k];
                }
        }
        for (size k = 0; k < few; k++) {
            squares[o + k] = square[k];
            if (filters) sums[o + k] = sum[k], along[o + k] = product[k];
        }
    }
}

/* x[B][H][W][C], g[B][L][K][O] -> rows[B][high][wide][C][O], and the summary of each, [B][O]; depthwise, C is O, and
   1 in rows. */
void conv_weights(const float *x, const float *g, float *rows, const float *filters, double *squares, double *sums,
                  double *along, size batch, const geometry *s) {
    size image = s->height * s->width * s->channels, outs = s->lines * s->columns * s->outputs;
    size count = s->high * s->wide * inputs_of_one(s);
    for (size b = 0; b < batch; b++) {
        float *mine = rows + b * count * s->outputs;
        size at = b * s->outputs;
        weights_of_one(x + b * image, g + b * outs, mine, s);
        summary(mine, filters, count, s->outputs, squares + at, sums + at, along + at);
    }
}

/* Norms over groups of channels. A column is K vectors of channels at RUN positions of an image, or fewer. */
#define EACH(K) UNROLL for (int k = 0; k < K; k++)
#define AT(V, x) (*(const V *)((x) + k * LANES_OF(V)))
#define ADD(V, K, total, sum)                                                                                          \
    for (size i = 0; i < K * LANES_OF(V); i++) (total)[i] += ((const float *)(sum))[i];

#define COLUMNS(V, K)                                                                                                  \
    static void V##_##K##_sum(const float *x, size positions, size step, double *total) {                              \
        V sum[K] = {0};                                                                                                \
        for (size p = 0; p < positions; p++, x += step) EACH(K) sum[k] += AT(V, x);                                    \
        ADD(V, K, total, sum)                                                                                          \
    }                                                                                                                  \
    static void V##_##K##_squares(const float *x, const float *mean, size positions, size step, double *total) {       \
        V sum[K] = {0}, middle[K];                                                                                     \
        EACH(K) middle[k] = AT(V, mean);                                                                               \
        for (size p = 0; p < positions; p++, x += step) EACH(K) {                                                      \
            V away = AT(V, x) - middle[k];                                                                             \
            sum[k] += away * away;                                                                                     \
        }                                                                                                              \
        ADD(V, K, total, sum)                                                                                          \
    }                                                                                                                  \
    static void V##_##K##_slopes(const float *x, const float *g, const float *mean, size positions, size step,         \
                                 double *scale, double *shift) {                                                       \
        V products[K] = {0}, slopes[K] = {0}, middle[K];                                                               \
        EACH(K) middle[k] = AT(V, mean);                                                                               \
        for (size p = 0; p < positions; p++, x += step, g += step)                                                     \
            EACH(K) products[k] += AT(V, g) * (AT(V, x) - middle[k]), slopes[k] += AT(V, g);                           \
        ADD(V, K, scale, products)                                                                                     \
        ADD(V, K, shift, slopes)                                                                                       \
    }                                                                                                                  \
    static void V##_##K##_scaled(const float *restrict x, const float *scale, const float *shift, size positions,      \
                                 size step, float *restrict out) {                                                     \
        V a[K], b[K];                                                                                                  \
        EACH(K) a[k] = AT(V, scale), b[k] = AT(V, shift);                                                              \
        for (size p = 0; p < positions; p++, x += step, out += step)                                                   \
            EACH(K) *(V *)(out + k * LANES_OF(V)) = AT(V, x) * a[k] + b[k];                                            \
    }                                                                                                                  \
    static void V##_##K##_mixed(const float *restrict x, const float *restrict g, const float *of_x,                   \
                                const float *of_g, const float *rest, size positions, size step,                       \
                                float *restrict out) {                                                                 \
        V a[K], b[K], c[K];                                                                                            \
        EACH(K) a[k] = AT(V, of_x), b[k] = AT(V, of_g), c[k] = AT(V, rest);                                            \
        for (size p = 0; p < positions; p++, x += step, g += step, out += step)                                        \
            EACH(K) *(V *)(out + k * LANES_OF(V)) = AT(V, x) * a[k] + AT(V, g) * b[k] + c[k];                          \
    }

COLUMNS(one, 1) COLUMNS(wide, 1) COLUMNS(wide, 4)

/* f(...) for every column: `few` positions from the value `at` of an image on, `c` being its first channel. */
#define EVERY_COLUMN(f, ...)                                                                                           \
    for (size start = 0; start < positions; start += RUN) {                                                            \
        size few = start + RUN < positions ? RUN : positions - start, c = 0, at = start * channels;                    \
        for (; c + 4 * LANES <= channels; c += 4 * LANES, at += 4 * LANES) wide_4_##f(__VA_ARGS__);                    \
        for (; c + LANES <= channels; c += LANES, at += LANES) wide_1_##f(__VA_ARGS__);                                \
        for (; c < channels; c++, at++) one_1_##f(__VA_ARGS__);                                                        \
    }

/* x[B][positions][channels] -> out, mean[B][groups], rstd[B][groups]; without a weight it is 1; room for 3 * channels
   doubles. */
void norm_forward(const float *x, const float *weight, const float *bias, float *out, float *mean, float *rstd,
                  double *room, size batch, size positions, size channels, size groups, double eps) {
    size each = channels / groups, count = positions * each;
    double *total = room;
    float *middle = (float *)(room + channels), *scale = middle + channels, *shift = scale + channels;
    for (size b = 0; b < batch; b++, x += positions * channels, out += positions * channels) {
        memset(total, 0, sizeof(double) * channels);
        EVERY_COLUMN(sum, x + at, few, channels, total + c)
        for (size i = 0; i < groups; i++) {
            double sum = 0;
            for (size c = i * each; c < (i + 1) * each; c++) sum += total[c];
            mean[b * groups + i] = sum / count;
            for (size c = i * each; c < (i + 1) * each; c++) middle[c] = mean[b * groups + i], total[c] = 0;
        }
        EVERY_COLUMN(squares, x + at, middle + c, few, channels, total + c)
        for (size i = 0; i < groups; i++) {
            double sum = 0;
            for (size c = i * each; c < (i + 1) * each; c++) sum += total[c];
            float inverse = rstd[b * groups + i] = 1 / sqrt(sum / count + eps);
            for (size c = i * each; c < (i + 1) * each; c++)
                scale[c] = inverse * (weight ? weight[c] : 1), shift[c] = (bias ? bias[c] : 0) - middle[c] * scale[c];
        }
        EVERY_COLUMN(scaled, x + at, scale + c, shift + c, few, channels, out + at)
    }
}

/* The gradient of x, unless `found` is null, and those of each example's weight and bias, [B][channels]; room for
   4 * channels doubles. */
void norm_backward(const float *x, const float *g, const float *weight, const float *mean, const float *rstd,
                   float *found, float *weights, float *biases, double *room, size batch, size positions,
                   size channels, size groups) {
    size each = channels / groups, count = positions * each;
    double *scale = room, *shift = room + channels;
    float *middle = (float *)(room + 2 * channels), *of_x = middle + channels, *of_g = of_x + channels,
          *rest = of_g + channels;
    for (size b = 0; b < batch; b++, x += positions * channels, g += positions * channels) {
        memset(room, 0, sizeof(double) * 2 * channels);
        for (size c = 0; c < channels; c++) middle[c] = mean[b * groups + c / each];
        EVERY_COLUMN(slopes, x + at, g + at, middle + c, few, channels, scale + c, shift + c)
        for (size i = 0; i < groups; i++) {
            double r = rstd[b * groups + i], products = 0, slopes = 0;
            for (size c = i * each; c < (i + 1) * each; c++) {
                weights[b * channels + c] = scale[c] * r, biases[b * channels + c] = shift[c];
                of_g[c] = weight ? weight[c] : 1;
                products += scale[c] * of_g[c], slopes += shift[c] * of_g[c];
            }
            double of_away = -products * r * r * r / count;
            for (size c = i * each; c < (i + 1) * each; c++) {
                of_x[c] = of_away, of_g[c] *= r;
                rest[c] = -slopes * r / count - of_away * middle[c];
            }
        }
        if (!found) continue;
        EVERY_COLUMN(mixed, x + at, g + at, of_x + c, of_g + c, rest + c, few, channels, found + at)
        found += positions * channels;
    }
}

/* x[B][positions][channels] -> sums[B][channels]; room for channels doubles. */
void position_sums(const float *x, float *sums, double *room, size batch, size positions, size channels) {
    for (size b = 0; b < batch; b++, x += positions * channels) {
        memset(room, 0, sizeof(double) * channels);
        EVERY_COLUMN(sum, x + at, few, channels, room + c)
        for (size c = 0; c < channels; c++) sums[b * channels + c] = room[c];
    }
}
"""
