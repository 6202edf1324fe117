/* Floating-point and vector work. The compiler is told to keep the order of operations, so checksums are exact. */
#include "workload.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

static uint64_t bits(double value)
{
    uint64_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

/* Five bodies that attract each other. */
uint64_t nbody(void)
{
    double place[5][3], speed[5][3], mass[5];
    for (int i = 0; i < 5; i++) {
        mass[i] = i ? 0.01 / i : 1.0;
        for (int d = 0; d < 3; d++) {
            place[i][d] = (i * 3 + d * d + 1) * (d % 2 ? -0.7 : 1.3);
            speed[i][d] = (i - d) * 0.01;
        }
    }
    for (int step = 0; step < 3000; step++) {
        for (int i = 0; i < 5; i++) {
            for (int j = i + 1; j < 5; j++) {
                double apart[3], square = 0.01;
                for (int d = 0; d < 3; d++) {
                    apart[d] = place[i][d] - place[j][d];
                    square += apart[d] * apart[d];
                }
                double pull = 0.001 / (square * sqrt(square));
                for (int d = 0; d < 3; d++) {
                    speed[i][d] -= apart[d] * mass[j] * pull;
                    speed[j][d] += apart[d] * mass[i] * pull;
                }
            }
        }
        for (int i = 0; i < 5; i++)
            for (int d = 0; d < 3; d++)
                place[i][d] += 0.001 * speed[i][d];
    }
    uint64_t sum = 0;
    for (int i = 0; i < 5; i++)
        for (int d = 0; d < 3; d++)
            sum = mix(sum, bits(place[i][d]));
    return sum;
}

/* The x87: a continued fraction, a logistic map and square roots in extended precision. */
uint64_t x87(void)
{
    volatile long double start = 0.25L;
    long double map = start, fraction = 1, roots = 0;
    for (int i = 1; i <= 20000; i++) {
        map = 3.9L * map * (1 - map);
        fraction = 1 + 1 / (fraction + map);
        roots += sqrtl(fraction + i);
    }
    uint64_t words[2] = { 0 };
    memcpy(words, &roots, 10);
    return mix(words[0], words[1]) ^ bits(map) ^ bits(fraction);
}

/* C = A B of 128 by 128 floats, eight columns at a time. */
__attribute__((target("avx2,fma"))) uint64_t matrix(void)
{
    enum { N = 128 };
    static float a[N][N] __attribute__((aligned(32))), b[N][N] __attribute__((aligned(32)));
    static float c[N][N] __attribute__((aligned(32)));
    /* The last that is filled tells that all are. */
    for (int i = 0; i < N && !a[0][0]; i++) {
        for (int k = 0; k < N; k++) {
            a[N - 1 - i][N - 1 - k] = (i * 3 + k) % 17 + 1;
            b[i][k] = (i + k * 5) % 13 - 6;
        }
    }
    for (int i = 0; i < N; i += 4) {
        for (int j = 0; j < N; j += 16) {
            __m256 sums[4][2] = { 0 };
            for (int k = 0; k < N; k++) {
                __m256 left = _mm256_load_ps(&b[k][j]), right = _mm256_load_ps(&b[k][j + 8]);
                for (int row = 0; row < 4; row++) {
                    __m256 factor = _mm256_broadcast_ss(&a[i + row][k]);
                    sums[row][0] = _mm256_fmadd_ps(factor, left, sums[row][0]);
                    sums[row][1] = _mm256_fmadd_ps(factor, right, sums[row][1]);
                }
            }
            for (int row = 0; row < 4; row++) {
                _mm256_store_ps(&c[i + row][j], sums[row][0]);
                _mm256_store_ps(&c[i + row][j + 8], sums[row][1]);
            }
        }
    }
    uint64_t sum = 0;
    for (int i = 0; i < N; i++)
        for (int k = 0; k < N; k += 7)
            sum = mix(sum, (int64_t)c[i][k]);
    return sum;
}

/* Points of the Mandelbrot set, four at a time; the inner loop touches no memory. */
__attribute__((target("avx2,fma"))) uint64_t registers(void)
{
    uint64_t sum = 0;
    for (int y = 0; y < 24; y++) {
        __m256d c_re = _mm256_set_pd(-1.5, -0.75, -0.1, 0.3), c_im = _mm256_set1_pd(y * 0.04);
        __m256d re = _mm256_setzero_pd(), im = re, four = _mm256_set1_pd(4), steps = re, one = _mm256_set1_pd(1);
        for (int i = 0; i < 6000; i++) {
            __m256d product = _mm256_mul_pd(re, im);
            __m256d next = _mm256_add_pd(_mm256_fmsub_pd(re, re, _mm256_mul_pd(im, im)), c_re);
            im = _mm256_add_pd(_mm256_add_pd(product, product), c_im);
            re = next;
            __m256d inside = _mm256_cmp_pd(_mm256_fmadd_pd(re, re, _mm256_mul_pd(im, im)), four, _CMP_LT_OQ);
            steps = _mm256_add_pd(steps, _mm256_and_pd(inside, one));
            /* Those that left stay where they are. */
            re = _mm256_and_pd(re, inside);
            im = _mm256_and_pd(im, inside);
        }
        double counts[4];
        _mm256_storeu_pd(counts, steps);
        for (int i = 0; i < 4; i++)
            sum = mix(sum, (uint64_t)counts[i]);
    }
    return sum;
}
