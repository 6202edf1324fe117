/* What the workloads share. A unit of a workload is about a millisecond of the host's time, always the same work from
 * the same start, and gives a checksum of what it computed. */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include <stddef.h>
#include <stdint.h>

typedef uint64_t unit(void);

/* integer.c */
unit sha256, quicksort, fib, sieve, bytecode, copy, hash_table, chase;
/* floats.c */
unit nbody, x87, matrix, registers;
/* kernel.c */
unit syscalls, ping_pong, forks, faults, execs, tcp;
/* threads.c */
unit threads;

/* program.c: a run of the program that `program_words` name, whose output is what it computed; and a run of `openssl
 * speed -mr`, which gives the units that it has counted. */
unit run_program, count_of_speed;
extern char **program_words;

/* Whether the processor has AVX2 and FMA, and the kernel saves their registers. */
int has_avx2(void);

/* Ends the process, with errno's words. */
void fail(const char *what) __attribute__((noreturn));

/* Numbers in no order, the same on every host (Steele, Lea, Flood: SplitMix). */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

/* Adds a word to a checksum; the order counts. */
static inline uint64_t mix(uint64_t sum, uint64_t word)
{
    return (sum << 7 | sum >> 57) * 0x100000001b3 ^ word;
}

#endif
