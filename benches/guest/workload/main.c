/* workload SECONDS NAME: repeats the unit of a workload for so many seconds of the clock.
 * workload SECONDS NAME run PROGRAM WORD...: the unit is a run of that program.
 * workload SECONDS NAME speed PROGRAM WORD...: the program is `openssl speed -mr`, and counts its units itself.
 *
 * It prints `begin NAME` after a first unit, and at the end `end NAME UNITS SECONDS PROCESSOR CHECKSUM`: the units since
 * then, the time on the clock, the processor time of the process and its children, and what each unit computed. Where
 * the processor lacks what the workload needs, it prints `unsupported NAME`. */
#define _GNU_SOURCE
#include "workload.h"

#include <errno.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

static const struct workload {
    const char *name;
    unit *run;
    int needs_avx2;
    int all_processors;
} workloads[] = {
    { "sha256", sha256, 0, 0 },       { "quicksort", quicksort, 0, 0 }, { "fib", fib, 0, 0 },
    { "sieve", sieve, 0, 0 },         { "bytecode", bytecode, 0, 0 },   { "memcpy", copy, 0, 0 },
    { "hash", hash_table, 0, 0 },     { "chase", chase, 0, 0 },         { "nbody", nbody, 0, 0 },
    { "x87", x87, 0, 0 },             { "matrix", matrix, 1, 0 },       { "registers", registers, 1, 0 },
    { "syscalls", syscalls, 0, 0 },   { "pingpong", ping_pong, 0, 0 },  { "fork", forks, 0, 0 },
    { "faults", faults, 0, 0 },       { "exec", execs, 0, 0 },          { "tcp", tcp, 0, 0 },
    { "threads", threads, 0, 1 },
};

void fail(const char *what)
{
    fprintf(stderr, "workload: %s: %s\n", what, strerror(errno));
    exit(1);
}

int has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static double clock_seconds(void)
{
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now))
        fail("clock_gettime");
    return now.tv_sec + now.tv_nsec * 1e-9;
}

static double processor_seconds(void)
{
    double sum = 0;
    for (int who = RUSAGE_CHILDREN; who <= RUSAGE_SELF; who++) {
        struct rusage used;
        if (getrusage(who, &used))
            fail("getrusage");
        sum += used.ru_utime.tv_sec + used.ru_stime.tv_sec;
        sum += (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e-6;
    }
    return sum;
}

/* One processor: what a machine with one vCPU has. */
static void stay_on_one_processor(void)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(sched_getcpu(), &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("sched_setaffinity");
}

static int repeat(const struct workload *workload, double seconds)
{
    if (workload->needs_avx2 && !has_avx2()) {
        printf("unsupported %s\n", workload->name);
        return 0;
    }
    if (!workload->all_processors)
        stay_on_one_processor();
    uint64_t checksum = workload->run();
    printf("begin %s\n", workload->name);
    fflush(stdout);
    uint64_t units = 0;
    double started = clock_seconds(), used = processor_seconds(), now;
    do {
        uint64_t again = workload->run();
        if (again != checksum) {
            fprintf(stderr, "workload: %s computed %" PRIx64 " and then %" PRIx64 "\n", workload->name, checksum, again);
            return 1;
        }
        units++;
        now = clock_seconds();
    } while (now - started < seconds);
    printf("end %s %" PRIu64 " %.6f %.6f %016" PRIx64 "\n", workload->name, units, now - started,
           processor_seconds() - used, checksum);
    return 0;
}

/* One run, whose units nobody can compare: there are as many of them as there was time for. */
static int measure_speed(const char *name)
{
    stay_on_one_processor();
    printf("begin %s\n", name);
    fflush(stdout);
    double started = clock_seconds(), used = processor_seconds();
    uint64_t units = count_of_speed();
    printf("end %s %" PRIu64 " %.6f %.6f %016x\n", name, units, clock_seconds() - started, processor_seconds() - used, 0);
    return 0;
}

int main(int count, char **words)
{
    if (count >= 5 && !strcmp(words[3], "run")) {
        struct workload program = { words[2], run_program, 0, 0 };
        program_words = words + 4;
        return repeat(&program, atof(words[1]));
    }
    if (count >= 5 && !strcmp(words[3], "speed")) {
        program_words = words + 4;
        return measure_speed(words[2]);
    }
    /* What the workload `exec` executes. */
    if (count == 2 && !strcmp(words[1], "nothing"))
        return 42;
    if (count == 3) {
        for (size_t at = 0; at < sizeof workloads / sizeof *workloads; at++) {
            if (!strcmp(words[2], workloads[at].name))
                return repeat(&workloads[at], atof(words[1]));
        }
    }
    fprintf(stderr, "workload SECONDS NAME, where NAME is one of:");
    for (size_t at = 0; at < sizeof workloads / sizeof *workloads; at++)
        fprintf(stderr, " %s", workloads[at].name);
    fprintf(stderr, "\n");
    return 2;
}
