/* Integer work of user programs. */
#include "workload.h"

#include <stdlib.h>
#include <string.h>

/* SHA-256 in plain C, as FIPS 180-4 writes it. */
static const uint32_t sha_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate(uint32_t word, int by)
{
    return word >> by | word << (32 - by);
}

static void sha_block(uint32_t state[8], const uint8_t *block)
{
    uint32_t w[64], v[8];
    for (int t = 0; t < 16; t++)
        w[t] = (uint32_t)block[4 * t] << 24 | block[4 * t + 1] << 16 | block[4 * t + 2] << 8 | block[4 * t + 3];
    for (int t = 16; t < 64; t++) {
        uint32_t s0 = rotate(w[t - 15], 7) ^ rotate(w[t - 15], 18) ^ w[t - 15] >> 3;
        uint32_t s1 = rotate(w[t - 2], 17) ^ rotate(w[t - 2], 19) ^ w[t - 2] >> 10;
        w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    memcpy(v, state, sizeof v);
    for (int t = 0; t < 64; t++) {
        uint32_t s1 = rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25);
        uint32_t t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + sha_constants[t] + w[t];
        uint32_t s0 = rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22);
        uint32_t t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++)
        state[i] += v[i];
}

uint64_t sha256(void)
{
    static uint8_t data[1 << 18];
    uint32_t state[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
    for (size_t at = 0; at < sizeof data; at++)
        data[at] = at * 7 + (at >> 8);
    for (size_t at = 0; at < sizeof data; at += 64)
        sha_block(state, data + at);
    uint64_t sum = 0;
    for (int i = 0; i < 8; i++)
        sum = mix(sum, state[i]);
    return sum;
}

/* Hoare's quicksort. */
static void sort(uint32_t *first, uint32_t *last)
{
    while (first < last) {
        uint32_t pivot = first[(last - first) / 2], *i = first, *j = last;
        do {
            while (*i < pivot)
                i++;
            while (pivot < *j)
                j--;
            if (i <= j) {
                uint32_t other = *i;
                *i++ = *j;
                *j-- = other;
            }
        } while (i <= j);
        sort(first, j);
        first = i;
    }
}

uint64_t quicksort(void)
{
    static uint32_t numbers[20000];
    const size_t count = sizeof numbers / sizeof *numbers;
    uint64_t state = 1, sum = 0;
    for (size_t at = 0; at < count; at++)
        numbers[at] = next_random(&state);
    sort(numbers, numbers + count - 1);
    for (size_t at = 0; at < count; at++)
        sum = mix(sum, numbers[at]);
    return sum;
}

static __attribute__((noinline, optimize("no-optimize-sibling-calls", "no-inline"))) uint64_t fibonacci(unsigned n)
{
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

uint64_t fib(void)
{
    volatile unsigned n = 25;
    return fibonacci(n);
}

/* The sieve of Eratosthenes. */
uint64_t sieve(void)
{
    static uint8_t composite[1 << 18];
    uint64_t sum = 0, primes = 0;
    memset(composite, 0, sizeof composite);
    for (size_t n = 2; n < sizeof composite; n++) {
        if (composite[n])
            continue;
        primes++;
        sum += n;
        for (size_t multiple = n * n; multiple < sizeof composite; multiple += n)
            composite[multiple] = 1;
    }
    return mix(sum, primes);
}

/* A machine with a stack and eight operations, which counts Collatz steps. */
enum { PUSH, LOAD, STORE, ADD, MUL, HALF, ODD, JUMP_IF_ZERO, JUMP, LESS, END };

static uint64_t interpret(const int *code)
{
    uint64_t stack[16], variables[8] = { 0 }, *top = stack;
    for (;;) {
        switch (*code++) {
        case PUSH: *top++ = *code++; break;
        case LOAD: *top++ = variables[*code++]; break;
        case STORE: variables[*code++] = *--top; break;
        case ADD: top--; top[-1] += *top; break;
        case MUL: top--; top[-1] *= *top; break;
        case HALF: top[-1] >>= 1; break;
        case ODD: top[-1] &= 1; break;
        case LESS: top--; top[-1] = top[-1] < *top; break;
        case JUMP_IF_ZERO: {
            int by = *code++;
            if (!*--top)
                code += by;
            break;
        }
        case JUMP: code += *code + 1; break;
        case END: return variables[2];
        }
    }
}

uint64_t bytecode(void)
{
    /* for (i = 1; i < 600; i++) for (n = i; n > 1; steps++) n = n & 1 ? 3 * n + 1 : n >> 1 */
    static const int code[] = {
        PUSH, 1, STORE, 0,                                        /*  0: i = 1 */
        LOAD, 0, PUSH, 600, LESS, JUMP_IF_ZERO, 49,               /*  4: i < 600 */
        LOAD, 0, STORE, 1,                                        /* 11: n = i */
        PUSH, 1, LOAD, 1, LESS, JUMP_IF_ZERO, 29,                 /* 15: 1 < n */
        LOAD, 1, ODD, JUMP_IF_ZERO, 10,                           /* 22: n is odd */
        LOAD, 1, PUSH, 3, MUL, PUSH, 1, ADD, JUMP, 3,             /* 27: 3 n + 1 */
        LOAD, 1, HALF,                                            /* 37: n / 2 */
        STORE, 1, LOAD, 2, PUSH, 1, ADD, STORE, 2, JUMP, -36,     /* 40: steps++ */
        LOAD, 0, PUSH, 1, ADD, STORE, 0, JUMP, -56, END,          /* 51: i++ */
    };
    return interpret(code);
}

uint64_t copy(void)
{
    static uint8_t from[1 << 20], to[1 << 20];
    if (!from[1])
        for (size_t at = 0; at < sizeof from; at++)
            from[at] = at * 13 + 1;
    uint64_t sum = 0;
    for (size_t len = sizeof from; len >= 16; len /= 2) {
        for (size_t at = 0; at < sizeof from && at < 64 * len; at += len)
            memcpy(to + at, from + (sizeof from - at - len), len);
        sum = mix(sum, to[len - 1] + to[len / 2]);
    }
    return sum;
}

/* Open addressing: counts words of numbers. */
uint64_t hash_table(void)
{
    static struct { uint64_t key, count; } table[1 << 16];
    const uint64_t mask = sizeof table / sizeof *table - 1;
    uint64_t state = 3, sum = 0;
    memset(table, 0, sizeof table);
    for (int i = 0; i < 60000; i++) {
        uint64_t key = next_random(&state) % 30000 + 1, slot = key * 0x9e3779b97f4a7c15 >> 20 & mask;
        while (table[slot].key && table[slot].key != key)
            slot = (slot + 1) & mask;
        table[slot].key = key;
        table[slot].count++;
        sum += table[slot].count * key;
    }
    return sum;
}

/* Follows pointers through 32 MiB, each line once in no order. */
uint64_t chase(void)
{
    enum { LINES = (32 << 20) / 64 };
    static struct { uint32_t next, pad[15]; } *lines;
    if (!lines) {
        uint64_t state = 5;
        lines = aligned_alloc(64, (size_t)LINES * 64);
        if (!lines)
            fail("aligned_alloc");
        for (uint32_t at = 0; at < LINES; at++)
            lines[at].next = at;
        /* Sattolo's shuffle leaves one cycle. */
        for (uint32_t at = LINES - 1; at > 0; at--) {
            uint32_t other = next_random(&state) % at, kept = lines[at].next;
            lines[at].next = lines[other].next;
            lines[other].next = kept;
        }
    }
    uint32_t at = 0;
    uint64_t sum = 0;
    for (int i = 0; i < 10000; i++) {
        at = lines[at].next;
        sum += at;
    }
    return sum;
}
