// Protection keys as a program sees them: the rights of PKRU in loads, stores and fetches, in the kernel's accesses for it,
// in its signals' frames and in each of its threads. Prints what is wrong, and "right" with the faults at the end.

#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

enum { PAGE = 4096, ROUNDS = 20000, EVERY = 100, THREADS = 4, TURNS = 300 };

static int failures;
static unsigned long faults;
static sigjmp_buf after;
static volatile sig_atomic_t code, key_told, grants;

static void check(int good, const char *what) {
    if (!good) {
        printf("WRONG: %s\n", what);
        failures++;
    }
}

static unsigned rdpkru(void) {
    unsigned eax, edx;
    __asm__ volatile("rdpkru" : "=a"(eax), "=d"(edx) : "c"(0));
    return eax;
}

static void wrpkru(unsigned value) {
    __asm__ volatile("wrpkru" : : "a"(value), "c"(0), "d"(0) : "memory");
}

// Where PKRU is in the frame's XSAVE area.
static unsigned pkru_offset(void) {
    unsigned eax, ebx, ecx, edx;
    __cpuid_count(0xd, 9, eax, ebx, ecx, edx);
    return ebx;
}

// Notes the fault, and either gives the interrupted code all rights or goes elsewhere.
static void on_fault(int number, siginfo_t *info, void *context) {
    (void)number;
    faults++;
    code = info->si_code;
    key_told = info->si_code == SEGV_PKUERR ? (int)info->si_pkey : -1;
    if (grants) {
        uint8_t *area = (uint8_t *)((ucontext_t *)context)->uc_mcontext.fpregs;
        memset(area + pkru_offset(), 0, 4);
        // Without its bit in XSTATE_BV the register would be initialized, which is the same.
        return;
    }
    siglongjmp(after, 1);
}

static int reads(volatile uint8_t *at) {
    if (sigsetjmp(after, 1)) return 0;
    (void)*at;
    return 1;
}

static int writes(volatile uint8_t *at, uint8_t value) {
    if (sigsetjmp(after, 1)) return 0;
    *at = value;
    return 1;
}

static uint8_t *page(int prot) {
    uint8_t *at = mmap(NULL, PAGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) abort();
    return at;
}

static void rights(uint8_t *at, int key) {
    for (unsigned rights = 0; rights < 4; rights++) {
        unsigned others = 0x55555554 & ~(3u << 2 * key);
        wrpkru(others | rights << 2 * key);
        int read = reads(at);
        check(read == !(rights & 1), "a load");
        check(read || (code == SEGV_PKUERR && key_told == key), "what a load's fault tells");
        wrpkru(others | rights << 2 * key);
        int written = writes(at, rights);
        check(written == !rights, "a store");
        check(written || (code == SEGV_PKUERR && key_told == key), "what a store's fault tells");
    }
    wrpkru(0x55555554);
}

// The kernel reads and writes for the program with the program's rights.
static void system_calls(uint8_t *at, int key) {
    int pipes[2];
    if (pipe(pipes)) abort();
    wrpkru(1u << 2 * key);
    check(write(pipes[1], at, 1) == -1 && errno == EFAULT, "write() from a page without rights");
    wrpkru(2u << 2 * key);
    check(write(pipes[1], at, 1) == 1, "write() from a page that can be read");
    check(read(pipes[0], at, 1) == -1 && errno == EFAULT, "read() into a page that cannot be written");
    wrpkru(0);
    close(pipes[0]);
    close(pipes[1]);
}

// A fault's handler has rights of its own, and changes those of the code that it returns to.
static void frames(uint8_t *at, int key) {
    grants = 1;
    wrpkru(3u << 2 * key);
    *(volatile uint8_t *)at = 0x5a;
    check(rdpkru() == 0, "PKRU after a handler that changed it in its frame");
    grants = 0;
    check(*at == 0x5a, "a store that was repeated");
}

// Stores that are run often enough to be translated, between changes of their rights.
static void often(uint8_t *at, int key) {
    volatile uint32_t *counter = (volatile uint32_t *)at;
    *counter = 0;
    for (int round = 0; round < ROUNDS; round++) {
        wrpkru(0);
        *counter += 1;
        wrpkru(2u << 2 * key);
        uint32_t seen = *counter;
        if (round % EVERY == 0) check(!writes(at, 0xff), "a store that was allowed before");
        if (seen != (uint32_t)round + 1) check(0, "a counter");
    }
    wrpkru(0);
}

// Memory that can only be executed has a key of its own, which does not keep it from being executed.
static void execute_only(void) {
    static const uint8_t answer[] = {0xb8, 42, 0, 0, 0, 0xc3};
    uint8_t *at = page(PROT_READ | PROT_WRITE);
    memcpy(at, answer, sizeof answer);
    if (mprotect(at, PAGE, PROT_EXEC)) abort();
    int (*function)(void) = (int (*)(void))(void *)at;
    check(function() == 42, "a call of what can only be executed");
    check(!reads(at) && code == SEGV_PKUERR, "a load of what can only be executed");
    munmap(at, PAGE);
}

static void *thread(void *number) {
    unsigned mine = 0x11111110u * (1 + (unsigned)(uintptr_t)number % 3);
    wrpkru(mine);
    for (int turn = 0; turn < TURNS; turn++) {
        sched_yield();
        for (volatile int spin = 0; spin < 2000; spin++) {}
        if (rdpkru() != mine) return "a thread's PKRU";
    }
    return NULL;
}

static void threads(void) {
    pthread_t all[THREADS];
    for (uintptr_t n = 0; n < THREADS; n++) {
        if (pthread_create(&all[n], NULL, thread, (void *)n)) abort();
    }
    for (int n = 0; n < THREADS; n++) {
        void *wrong;
        pthread_join(all[n], &wrong);
        check(!wrong, wrong);
    }
    wrpkru(0x1230);
    pid_t child = fork();
    if (!child) _exit(rdpkru() != 0x1230);
    int status;
    waitpid(child, &status, 0);
    check(!status, "a child's PKRU");
    wrpkru(0);
}

int main(void) {
    static uint8_t stack[65536];
    stack_t other = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigaltstack(&other, NULL);
    sigaction(SIGSEGV, &action, NULL);
    int key = pkey_alloc(0, 0);
    if (key <= 0) {
        printf("WRONG: no protection key: %s\n", strerror(errno));
        return 1;
    }
    uint8_t *at = page(PROT_READ | PROT_WRITE);
    if (pkey_mprotect(at, PAGE, PROT_READ | PROT_WRITE, key)) abort();
    rights(at, key);
    system_calls(at, key);
    frames(at, key);
    often(at, key);
    execute_only();
    threads();
    if (failures) printf("WRONG: %d in all\n", failures);
    else printf("right, %lu faults\n", faults);
    return failures != 0;
}
