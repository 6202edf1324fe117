// Code that changes while it runs, in every way that the processor and Linux allow. Intel SDM vol. 3, "Handling Self- and
// Cross-Modifying Code". Each part checks its results and prints a line; the status is 1 where one was wrong.
//
// Usage: stress_code SCALE CPUS [dma]. `dma` also lets the machine's fw_cfg device write code: as root, in a machine that
// has it.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, RWX = PROT_READ | PROT_WRITE | PROT_EXEC };

typedef uint32_t function(uint32_t);

static int scale, cpus, failures;
static uint64_t seed = 88172645463325252ull;

static uint64_t rnd(void) {
    seed ^= seed << 13;
    seed ^= seed >> 7;
    return seed ^= seed << 17;
}

#define CHECK(condition, ...)                                                                     \
    do {                                                                                          \
        if (!(condition) && failures++ < 20) {                                                    \
            printf("WRONG %s:%d: ", __func__, __LINE__);                                          \
            printf(__VA_ARGS__);                                                                  \
            puts("");                                                                             \
        }                                                                                         \
    } while (0)

static void *map(size_t pages, int protection) {
    void *at = mmap(NULL, pages * PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    return at;
}

static void serialize(void) {
    uint32_t a = 0, b, c = 0, d;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) :: "memory");
}

static uint32_t call(const void *at, uint32_t argument) {
    // The compiler must not think that it knows what is there.
    asm volatile("" ::: "memory");
    return ((function *)(uintptr_t)at)(argument);
}

// mov $value, %eax; ret
static void write_constant(uint8_t *at, uint32_t value) {
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static void next_instruction(void) {
    uint8_t *code = map(1, RWX);
    // mov %edi, next+1(%rip); next: mov $0, %eax; ret
    memcpy(code, "\x89\x3d\x01\0\0\0\xb8\0\0\0\0\xc3", 12);
    for (int n = 0; n < 2000 * scale; n++) {
        uint32_t value = rnd();
        uint32_t got = call(code, value);
        CHECK(got == value, "%x, not %x", got, value);
    }
    munmap(code, PAGE);
}

static void own_loop(void) {
    uint8_t *code = map(1, RWX);
    // xor %eax, %eax; mov %edi, %ecx; l: add $0, %eax; mov %cl, l+2(%rip); dec %ecx; jnz l; ret: each round adds what the
    // round before stored.
    memcpy(code, "\x31\xc0\x89\xf9\x83\xc0\0\x88\x0d\xf9\xff\xff\xff\xff\xc9\x75\xf3\xc3", 18);
    for (int n = 0; n < 20 * scale; n++) {
        code[6] = 0;
        uint32_t rounds = 2 + rnd() % 100, sum = rounds * (rounds + 1) / 2 - 1;
        uint32_t got = call(code, rounds);
        CHECK(got == sum, "%u, not %u after %u rounds", got, sum, rounds);
    }
    munmap(code, PAGE);
}

static void alias(void) {
    int file = memfd_create("code", 0);
    CHECK(ftruncate(file, PAGE) == 0, "no file");
    uint8_t *write = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    uint8_t *execute = mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, file, 0);
    for (int n = 0; n < 2000 * scale; n++) {
        uint32_t value = rnd(), at = value % 4000;
        write_constant(write + at, value);
        serialize();
        CHECK(call(execute + at, 0) == value, "the alias runs old code");
    }
    // Through the file itself.
    for (int n = 0; n < 200 * scale; n++) {
        uint8_t bytes[6];
        uint32_t value = rnd();
        write_constant(bytes, value);
        CHECK(pwrite(file, bytes, 6, 64) == 6, "pwrite");
        CHECK(call(execute + 64, 0) == value, "old code after a write to the file");
    }
    close(file);
    munmap(write, PAGE);
    munmap(execute, PAGE);
}

static void string_and_vector_stores(void) {
    uint8_t *code = map(2, RWX), template[64];
    for (int n = 0; n < 1000 * scale; n++) {
        uint32_t value = rnd(), at = PAGE - 32 + value % 27;
        memset(template, 0x90, sizeof template);
        write_constant(template + 20, value);
        void *to = code + at, *from = template;
        uint64_t count = 26;
        switch (n % 3) {
        case 0: asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) :: "memory"); break;
        case 1:
            asm volatile("movdqu (%1), %%xmm0; movdqu 16(%1), %%xmm1; movdqu %%xmm0, (%0); movdqu %%xmm1, 16(%0)"
                         :: "r"(to), "r"(from) : "memory", "xmm0", "xmm1");
            break;
        default:
            count = 20;
            asm volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(0x90) : "memory");
            for (int byte = 0; byte < 6; byte++) {
                code[at + 20 + byte] = template[20 + byte];
            }
        }
        CHECK(call(code + at, 0) == value, "old code after string or vector stores, %d", n % 3);
    }
    munmap(code, 2 * PAGE);
}

static void across_pages(void) {
    uint8_t *code = map(2, RWX);
    for (int n = 0; n < 500 * scale; n++) {
        uint32_t value = rnd();
        int in_first = 1 + rnd() % 5;
        write_constant(code + PAGE - in_first, value);
        CHECK(call(code + PAGE - in_first, 0) == value, "an instruction in two pages");
        // Only the part in the second page changes.
        code[PAGE - in_first + 4] ^= 0x55;
        CHECK(call(code + PAGE - in_first, 0) == (value ^ 0x55000000), "its end changed");
        if (n % 16 == 0) {
            // The second page becomes another one.
            uint8_t *other = map(1, RWX);
            memcpy(other, code + PAGE, PAGE);
            if (in_first <= 4) {
                other[4 - in_first] ^= 0xff;
            }
            CHECK(mremap(other, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, code + PAGE) != MAP_FAILED, "mremap");
            uint32_t expected = value ^ 0x55000000 ^ (in_first <= 4 ? 0xff000000 : 0);
            CHECK(call(code + PAGE - in_first, 0) == expected, "its second page is another one");
        }
    }
    munmap(code, 2 * PAGE);
}

static sigjmp_buf back;
static volatile sig_atomic_t faults;

static void on_fault(int signal) {
    (void)signal;
    faults++;
    siglongjmp(back, 1);
}

static int call_faults(const void *at) {
    if (sigsetjmp(back, 1) == 0) {
        call(at, 0);
        return 0;
    }
    return 1;
}

static void rights(void) {
    uint8_t *code = map(1, PROT_READ | PROT_WRITE);
    for (int n = 0; n < 200 * scale; n++) {
        uint32_t value = rnd();
        CHECK(mprotect(code, PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
        write_constant(code, value);
        CHECK(call_faults(code), "code in a page without execution");
        CHECK(mprotect(code, PAGE, PROT_READ | PROT_EXEC) == 0, "mprotect");
        CHECK(call(code, 0) == value && call(code, 0) == value, "old code after mprotect");
        if (sigsetjmp(back, 1) == 0) {
            *(volatile uint8_t *)code = 0xcc;
            CHECK(0, "a store to read-only code");
        }
        CHECK(call(code, 0) == value, "a store that faulted changed code");
        if (n % 4 == 0) {
            CHECK(mprotect(code, PAGE, PROT_NONE) == 0 && call_faults(code), "code in a page without rights");
        }
    }
    munmap(code, PAGE);
}

static void moves(void) {
    uint8_t *place = map(4, PROT_NONE);
    for (int n = 0; n < 200 * scale; n++) {
        uint32_t value = rnd();
        uint8_t *code = mmap(place, PAGE, RWX, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        write_constant(code, value);
        CHECK(call(code, 0) == value, "a new page at an old place runs old code");
        uint8_t *moved = mremap(code, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place + 2 * PAGE);
        CHECK(moved == place + 2 * PAGE && call(moved, 0) == value, "moved code");
        CHECK(call_faults(place), "code where it was moved from");
        munmap(moved, PAGE);
        CHECK(call_faults(moved), "code that was unmapped");
    }
    munmap(place, 4 * PAGE);
}

// A just-in-time compiler's memory: functions come, are called often, and give their place to others.
static void pool(void) {
    enum { SLOTS = 512, BYTES = 48 };
    uint8_t *code = map(SLOTS * BYTES / PAGE + 1, RWX);
    uint32_t values[SLOTS], adds[SLOTS];
    uint8_t lives[SLOTS] = {0};
    for (int n = 0; n < 20000 * scale; n++) {
        int slot = rnd() % SLOTS;
        uint8_t *at = code + slot * BYTES;
        if (!lives[slot] || rnd() % 16 == 0) {
            values[slot] = rnd();
            adds[slot] = rnd() % 9;
            // lea value(%rdi), %eax; inc %eax, some times; ret
            memcpy(at, "\x8d\x87", 2);
            memcpy(at + 2, &values[slot], 4);
            for (uint32_t k = 0; k < adds[slot]; k++) {
                memcpy(at + 6 + 2 * k, "\xff\xc0", 2);
            }
            at[6 + 2 * adds[slot]] = 0xc3;
            lives[slot] = 1;
        }
        for (int calls = rnd() % 40; calls >= 0; calls--) {
            uint32_t argument = rnd();
            CHECK(call(at, argument) == argument + values[slot] + adds[slot], "a reused slot runs old code");
        }
    }
    munmap(code, (SLOTS * BYTES / PAGE + 1) * PAGE);
}

static void forks(char *self) {
    uint8_t *code = map(1, RWX);
    for (int n = 0; n < 10 * scale; n++) {
        uint32_t value = rnd() & 0x7f, other = rnd() & 0x7f;
        write_constant(code, value);
        CHECK(call(code, 0) == value, "before the fork");
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            int wrong = call(code, 0) != value;
            write_constant(code, other);
            wrong |= call(code, 0) != other;
            if (n % 2 && !wrong) {
                char text[16];
                snprintf(text, sizeof text, "%u", other);
                execl(self, self, "child", text, NULL);
            }
            _exit(wrong ? 0x80 : other);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == (int)other,
              "a child ends with %x, not %x", status, other);
        CHECK(call(code, 0) == value, "a child's code in its parent");
    }
    munmap(code, PAGE);
}

static void on_cpu(int thread) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(thread % cpus, &set);
    sched_setaffinity(0, sizeof set, &set);
}

// Another thread modifies the code, by the manual's protocol.
static uint8_t *shared;
static _Atomic uint32_t ready, taken, generation, finished;

static void *cross_writer(void *argument) {
    (void)argument;
    on_cpu(1);
    for (uint32_t n = 1; n <= 300u * scale; n++) {
        write_constant(shared + n % 7 * 9, n);
        atomic_store(&ready, n);
        for (int spins = 0; atomic_load(&taken) != n; spins++) {
            if (spins > 1000) {
                sched_yield();
            }
        }
    }
    return NULL;
}

static void cross_modification(void) {
    pthread_t writer;
    shared = map(1, RWX);
    atomic_store(&ready, 0);
    atomic_store(&taken, 0);
    on_cpu(0);
    pthread_create(&writer, NULL, cross_writer, NULL);
    for (uint32_t n = 1; n <= 300u * scale; n++) {
        for (int spins = 0; atomic_load(&ready) != n; spins++) {
            if (n > 1) {
                // What is there already stays hot.
                call(shared + (n - 1) % 7 * 9, 0);
            }
            if (spins > 1000) {
                sched_yield();
            }
        }
        serialize();
        uint32_t got = call(shared + n % 7 * 9, 0);
        CHECK(got == n, "%u, not %u after another thread's store", got, n);
        atomic_store(&taken, n);
    }
    pthread_join(writer, NULL);
    munmap(shared, PAGE);
}

// The same with a barrier that the writer asks the kernel for: the others run on meanwhile.
static void *barrier_reader(void *argument) {
    on_cpu((int)(intptr_t)argument);
    uint64_t calls = 0, wrong = 0;
    while (!atomic_load(&finished)) {
        uint32_t least = atomic_load(&generation);
        wrong += call(shared, 0) < least;
        calls++;
    }
    return (void *)(uintptr_t)(wrong << 1 | (calls == 0));
}

static void barrier(void) {
    enum { READERS = 3 };
    pthread_t readers[READERS];
    if (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0)) {
        return;
    }
    shared = map(1, RWX);
    // The constant lies within an aligned quadword, so that one store changes it.
    uint8_t bytes[8] = {0xb8, 0, 0, 0, 0, 0xc3, 0x90, 0x90};
    memcpy(shared, bytes, 8);
    atomic_store(&generation, 0);
    atomic_store(&finished, 0);
    on_cpu(0);
    for (int n = 0; n < READERS; n++) {
        pthread_create(&readers[n], NULL, barrier_reader, (void *)(intptr_t)(n + 1));
    }
    for (uint32_t n = 1; n <= 100u * scale; n++) {
        uint64_t quad;
        memcpy(bytes + 1, &n, 4);
        memcpy(&quad, bytes, 8);
        *(volatile uint64_t *)shared = quad;
        CHECK(syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE, 0, 0) == 0, "membarrier");
        atomic_store(&generation, n);
        if (n % 8 == 0) {
            sched_yield();
        }
    }
    atomic_store(&finished, 1);
    for (int n = 0; n < READERS; n++) {
        void *result;
        pthread_join(readers[n], &result);
        CHECK((uintptr_t)result >> 1 == 0, "old code after a barrier");
    }
    munmap(shared, PAGE);
}

// Signals in hot code that is patched, by a timer that is always due.
static volatile uint64_t ticks;
static uint8_t *patched;

static void on_tick(int signal) {
    (void)signal;
    ticks++;
    // A NOP of another form, in code that may be running.
    memcpy(patched + 8, ticks & 1 ? "\x66\x90" : "\x89\xc0", 2);
}

static void storm(void) {
    patched = map(1, RWX);
    // xor %eax, %eax; mov %edi, %ecx; l: rol $5, %eax; nop; two bytes that the handler changes; add %ecx, %eax; dec %ecx;
    // jnz l; ret
    memcpy(patched, "\x31\xc0\x89\xf9\xc1\xc0\x05\x90\x66\x90\x01\xc8\xff\xc9\x75\xf4\xc3", 17);
    uint32_t rounds = 20000, expected = 0;
    for (uint32_t n = rounds; n; n--) {
        expected = (expected << 5 | expected >> 27) + n;
    }
    struct sigaction action = {.sa_handler = on_tick};
    sigaction(SIGALRM, &action, NULL);
    struct itimerval period = {{0, 50}, {0, 50}};
    ticks = 0;
    setitimer(ITIMER_REAL, &period, NULL);
    for (int n = 0; n < 40 * scale || ticks < 20; n++) {
        uint32_t got = call(patched, rounds);
        CHECK(got == expected, "%x, not %x under signals", got, expected);
    }
    memset(&period, 0, sizeof period);
    setitimer(ITIMER_REAL, &period, NULL);
    munmap(patched, PAGE);
}

// A child is stepped through hot code, instruction by instruction, and stopped by a hardware breakpoint.
static void stepping(void) {
    uint8_t *code = map(1, RWX);
    // mov %edi, %ecx; l: inc %eax; push %rax; pop %rdx; dec %ecx; jnz l; ret
    memcpy(code, "\x89\xf9\xff\xc0\x50\x5a\xff\xc9\x75\xf8\xc3", 11);
    pid_t child = fork();
    if (child == 0) {
        for (int n = 0; n < 200; n++) {
            call(code, 50);
        }
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        call(code, 20);
        raise(SIGSTOP);
        call(code, 30);
        _exit(7);
    }
    int status;
    waitpid(child, &status, 0);
    CHECK(WIFSTOPPED(status), "the child stops");
    uint64_t start = (uint64_t)(uintptr_t)code;
    int steps = 0, inside = 0, order = 1;
    uint64_t last = 0;
    for (; steps < 100000; steps++) {
        struct user_regs_struct registers;
        if (ptrace(PTRACE_SINGLESTEP, child, 0, 0) || waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) {
            break;
        }
        if (WSTOPSIG(status) == SIGSTOP) {
            break;
        }
        ptrace(PTRACE_GETREGS, child, 0, &registers);
        uint64_t rip = registers.rip - start;
        if (rip < 11) {
            static const uint8_t before[11] = {[2] = 1, [4] = 1, [5] = 1, [6] = 1, [8] = 1, [10] = 1};
            order &= rip == 0 || (before[rip] && (rip == 2 ? last == 0 || last == 8 : rip == 4 ? last == 2
                     : rip == 5 ? last == 4 : rip == 6 ? last == 5 : rip == 8 ? last == 6 : last == 8));
            last = rip;
            inside++;
        }
    }
    CHECK(order, "steps out of order");
    CHECK(inside == 2 + 20 * 5, "%d steps in the function", inside);
    // An instruction breakpoint at the loop's first instruction.
    size_t debug = offsetof(struct user, u_debugreg);
    CHECK(ptrace(PTRACE_POKEUSER, child, debug, start + 2) == 0, "DR0");
    CHECK(ptrace(PTRACE_POKEUSER, child, debug + 7 * 8, 1) == 0, "DR7");
    int hits = 0;
    for (;;) {
        ptrace(PTRACE_CONT, child, 0, 0);
        if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status)) {
            break;
        }
        struct user_regs_struct registers;
        ptrace(PTRACE_GETREGS, child, 0, &registers);
        hits += WSTOPSIG(status) == SIGTRAP && registers.rip == start + 2;
    }
    CHECK(hits == 30, "%d hits of a breakpoint", hits);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7, "the child's end: %x", status);
    munmap(code, PAGE);
}

// fw_cfg writes its signature, "QEMU", over four NOPs: push %rcx; push %r13.
static uint64_t physical(const void *at) {
    uint64_t entry = 0;
    int file = open("/proc/self/pagemap", O_RDONLY);
    if (file < 0 || pread(file, &entry, 8, (uintptr_t)at / PAGE * 8) != 8) {
        entry = 0;
    }
    close(file);
    return (entry & ((1ull << 55) - 1)) * PAGE + (uintptr_t)at % PAGE;
}

static void by_device(void) {
    uint8_t *code = map(2, RWX);
    mlock(code, 2 * PAGE);
    // mov %rsp, %rdx; four bytes; mov %rdx, %rax; sub %rsp, %rax; mov %rdx, %rsp; ret
    memcpy(code, "\x48\x89\xe2\x90\x90\x90\x90\x48\x89\xd0\x48\x29\xe0\x48\x89\xd4\xc3", 17);
    volatile uint32_t *request = (volatile uint32_t *)(code + PAGE);
    request[0] = 1;
    uint64_t to = physical(code + 3), from = physical((void *)request);
    if (to < PAGE || from < PAGE || iopl(3)) {
        CHECK(0, "this takes root and ports");
        return;
    }
    for (int n = 0; n < 100 * scale; n++) {
        memset(code + 3, 0x90, 4);
        for (int k = 0; k < 50; k++) {
            CHECK(call(code, 0) == 0, "the NOPs");
        }
        request[1] = __builtin_bswap32(4);
        request[2] = __builtin_bswap32(to >> 32);
        request[3] = __builtin_bswap32(to);
        request[0] = __builtin_bswap32(0 << 16 | 8 | 2);
        outl(__builtin_bswap32(from >> 32), 0x514);
        outl(__builtin_bswap32(from), 0x518);
        while (request[0] & ~__builtin_bswap32(1)) {
        }
        CHECK(request[0] == 0 && memcmp(code + 3, "QEMU", 4) == 0, "the device's transfer: %x", request[0]);
        CHECK(call(code, 0) == 16, "old code after a device's write");
    }
    munmap(code, 2 * PAGE);
}

static void part(const char *name, void (*run)(void)) {
    struct timespec from, to;
    int before = failures;
    clock_gettime(CLOCK_MONOTONIC, &from);
    run();
    clock_gettime(CLOCK_MONOTONIC, &to);
    long milliseconds = (to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000;
    printf("%-28s %s %6ld ms\n", name, failures == before ? "right" : "WRONG", milliseconds);
}

static char *self;
static void all_forks(void) {
    forks(self);
}

int main(int count, char **arguments) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (count > 2 && strcmp(arguments[1], "child") == 0) {
        uint8_t *code = map(1, RWX);
        write_constant(code, atoi(arguments[2]));
        return call(code, 0);
    }
    scale = count > 1 ? atoi(arguments[1]) : 1;
    cpus = count > 2 ? atoi(arguments[2]) : 1;
    self = arguments[0];
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
    part("the next instruction", next_instruction);
    part("its own loop", own_loop);
    part("through another mapping", alias);
    part("string and vector stores", string_and_vector_stores);
    part("across pages", across_pages);
    part("rights", rights);
    part("moves", moves);
    part("a pool of functions", pool);
    part("forks and execs", all_forks);
    part("another thread", cross_modification);
    part("another thread's barrier", barrier);
    part("signals", storm);
    part("single steps", stepping);
    if (count > 3) {
        part("a device", by_device);
    }
    printf("%s, %d faults\n", failures ? "wrong" : "right", (int)faults);
    return failures != 0;
}
