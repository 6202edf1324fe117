/* Work that is the kernel's. */
#define _GNU_SOURCE
#include "workload.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

uint64_t syscalls(void)
{
    pid_t parent = getppid();
    uint64_t same = 0;
    for (int i = 0; i < 3000; i++)
        same += syscall(SYS_getppid) == parent;
    return same;
}

static int status_of(pid_t child)
{
    int status;
    if (waitpid(child, &status, 0) != child || !WIFEXITED(status))
        fail("waitpid");
    return WEXITSTATUS(status);
}

/* A byte goes to and fro between two processes; whoever has it adds one. */
uint64_t ping_pong(void)
{
    enum { TURNS = 200 };
    int there[2], back[2];
    uint8_t byte = 0;
    if (pipe(there) || pipe(back))
        fail("pipe");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (!child) {
        for (int i = 0; i < TURNS; i++) {
            if (read(there[0], &byte, 1) != 1)
                _exit(1);
            byte++;
            if (write(back[1], &byte, 1) != 1)
                _exit(1);
        }
        _exit(7);
    }
    for (int i = 0; i < TURNS; i++) {
        byte++;
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            fail("the pipe");
    }
    for (int end = 0; end < 2; end++) {
        close(there[end]);
        close(back[end]);
    }
    return status_of(child) << 8 | byte;
}

uint64_t forks(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < 10; i++) {
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (!child)
            _exit(i);
        sum = mix(sum, status_of(child));
    }
    return sum;
}

/* Touches fresh pages. */
uint64_t faults(void)
{
    enum { BYTES = 4 << 20, PAGE = 4096 };
    uint8_t *pages = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || madvise(pages, BYTES, MADV_NOHUGEPAGE))
        fail("mmap");
    uint64_t sum = 0;
    for (size_t at = 0; at < BYTES; at += PAGE)
        pages[at] = at / PAGE;
    for (size_t at = 0; at < BYTES; at += PAGE)
        sum += pages[at];
    if (munmap(pages, BYTES))
        fail("munmap");
    return sum;
}

uint64_t execs(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < 3; i++) {
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (!child) {
            execl("/proc/self/exe", "workload", "nothing", (char *)NULL);
            _exit(1);
        }
        sum = mix(sum, status_of(child));
    }
    return sum;
}

enum { MESSAGE = 1 << 14, MESSAGES = 128 };

static void send_all(const struct sockaddr_in *to)
{
    static uint8_t message[MESSAGE];
    int out = socket(AF_INET, SOCK_STREAM, 0);
    if (out < 0 || connect(out, (const struct sockaddr *)to, sizeof *to))
        _exit(1);
    for (int i = 0; i < MESSAGES; i++) {
        message[i] = i;
        for (size_t sent = 0; sent < MESSAGE;) {
            ssize_t now = write(out, message + sent, MESSAGE - sent);
            if (now <= 0)
                _exit(1);
            sent += now;
        }
    }
    _exit(9);
}

/* Two processes and one connection: 2 MiB through the loopback device. */
uint64_t tcp(void)
{
    static uint8_t buffer[1 << 16];
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr = { htonl(INADDR_LOOPBACK) } };
    socklen_t length = sizeof at;
    int door = socket(AF_INET, SOCK_STREAM, 0);
    if (door < 0 || bind(door, (struct sockaddr *)&at, length) || listen(door, 1))
        fail("listen");
    if (getsockname(door, (struct sockaddr *)&at, &length))
        fail("getsockname");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (!child)
        send_all(&at);
    int in = accept(door, NULL, NULL);
    if (in < 0)
        fail("accept");
    uint64_t bytes = 0, sum = 0;
    for (ssize_t now; (now = read(in, buffer, sizeof buffer)) != 0;) {
        if (now < 0)
            fail("read");
        for (ssize_t i = 0; i < now; i++)
            sum += buffer[i] * (bytes + i);
        bytes += now;
    }
    close(in);
    close(door);
    return mix(sum, bytes) + status_of(child);
}
