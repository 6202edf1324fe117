/* A unit that is one run of a program, and a program that counts its own units. */
#define _GNU_SOURCE
#include "workload.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

char **program_words;

/* Starts the program with one of its descriptors on a pipe; gives the pipe's other end. */
static int start(int descriptor, pid_t *child)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC))
        fail("pipe2");
    *child = fork();
    if (*child < 0)
        fail("fork");
    if (*child == 0) {
        int nothing = open("/dev/null", O_RDONLY);
        if (nothing < 0 || dup2(nothing, 0) < 0 || dup2(ends[1], descriptor) < 0)
            fail("dup2");
        execv(program_words[0], program_words);
        fail(program_words[0]);
    }
    close(ends[1]);
    return ends[0];
}

static void wait_for(pid_t child)
{
    int status;
    if (waitpid(child, &status, 0) != child)
        fail("waitpid");
    if (status) {
        fprintf(stderr, "workload: %s ended with status %#x\n", program_words[0], status);
        exit(1);
    }
}

uint64_t run_program(void)
{
    static unsigned char buffer[1 << 16];
    pid_t child;
    int output = start(1, &child);
    uint64_t sum = 0;
    ssize_t count;
    while ((count = read(output, buffer, sizeof buffer)) > 0)
        for (ssize_t at = 0; at < count; at++)
            sum = mix(sum, buffer[at]);
    close(output);
    wait_for(child);
    return sum;
}

uint64_t count_of_speed(void)
{
    char line[256];
    pid_t child;
    FILE *errors = fdopen(start(2, &child), "r");
    if (!errors)
        fail("fdopen");
    unsigned long long count, sum = 0;
    while (fgets(line, sizeof line, errors))
        if (sscanf(line, "+R:%llu:", &count) == 1)
            sum += count;
    fclose(errors);
    wait_for(child);
    return sum;
}
