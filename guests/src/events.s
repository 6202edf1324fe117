// 64-bit mode: running a snippet from a state of all registers until an event, and handling interrupts.
//
// Offsets within `long::State`: see there.

.text
.code64

// long_run(): starts at LONG_STATE, returns when an event ended it. What it clobbers is what the ABI says.
.globl long_run
long_run:
    save_own
    mov %cr0, %rax
    mov %rax, saved_cr0
    mov %cr4, %rax
    mov %rax, saved_cr4
    mov %cr3, %rax
    mov %rax, saved_cr3
    mov %rsp, saved_rsp
    movb $1, long_catching
    pushq LONG_STATE + 8 * 19       // SS
    pushq LONG_STATE + 8 * 4        // RSP
    pushq LONG_STATE + 8 * 17       // RFLAGS
    pushq LONG_STATE + 8 * 18       // CS
    pushq LONG_STATE + 8 * 16       // RIP
    mov LONG_STATE + 8 * 20, %eax
    mov %eax, %ds
    mov LONG_STATE + 8 * 21, %eax
    mov %eax, %es
    mov LONG_STATE + 8 * 0, %rax
    mov LONG_STATE + 8 * 1, %rcx
    mov LONG_STATE + 8 * 2, %rdx
    mov LONG_STATE + 8 * 3, %rbx
    mov LONG_STATE + 8 * 5, %rbp
    mov LONG_STATE + 8 * 6, %rsi
    mov LONG_STATE + 8 * 7, %rdi
    mov LONG_STATE + 8 * 8, %r8
    mov LONG_STATE + 8 * 9, %r9
    mov LONG_STATE + 8 * 10, %r10
    mov LONG_STATE + 8 * 11, %r11
    mov LONG_STATE + 8 * 12, %r12
    mov LONG_STATE + 8 * 13, %r13
    mov LONG_STATE + 8 * 14, %r14
    mov LONG_STATE + 8 * 15, %r15
.globl long_run_iret
long_run_iret:
    iretq

// One entry of 16 bytes for each vector. Where the processor pushes no error code, a zero stands for it.
.balign 16
.globl long_entries
long_entries:
    .set vector, 0
    .rept 256
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
    .byte 0x6a, 0                   // push $0
    .endif
    .byte 0x68                      // push $vector
    .long vector
    .byte 0xe9                      // jmp
    .long long_event - . - 4
    .set vector, vector + 1
    .endr

// The stack: vector, error code, RIP, CS, RFLAGS, RSP, SS.
long_event:
    push %rax
    push %rcx
    mov 16(%rsp), %ecx
    mov long_handlers(, %rcx, 8), %rax
    test %rax, %rax
    jnz long_handle
    cmpb $0, long_catching
    je long_unexpected
    movb $0, long_catching
    mov %rdx, LONG_STATE + 8 * 2
    mov %rbx, LONG_STATE + 8 * 3
    mov %rbp, LONG_STATE + 8 * 5
    mov %rsi, LONG_STATE + 8 * 6
    mov %rdi, LONG_STATE + 8 * 7
    mov %r8, LONG_STATE + 8 * 8
    mov %r9, LONG_STATE + 8 * 9
    mov %r10, LONG_STATE + 8 * 10
    mov %r11, LONG_STATE + 8 * 11
    mov %r12, LONG_STATE + 8 * 12
    mov %r13, LONG_STATE + 8 * 13
    mov %r14, LONG_STATE + 8 * 14
    mov %r15, LONG_STATE + 8 * 15
    mov %rsp, LONG_STATE + 8 * 25
    addq $8 * 9, LONG_STATE + 8 * 25    // where the stack was when the processor began to push
    popq LONG_STATE + 8 * 1
    popq LONG_STATE + 8 * 0
    popq LONG_STATE + 8 * 22        // vector
    popq LONG_STATE + 8 * 23        // error code
    popq LONG_STATE + 8 * 16
    popq LONG_STATE + 8 * 18
    popq LONG_STATE + 8 * 17
    popq LONG_STATE + 8 * 4
    popq LONG_STATE + 8 * 19
    mov %ds, %eax
    mov %rax, LONG_STATE + 8 * 20
    mov %es, %eax
    mov %rax, LONG_STATE + 8 * 21
    mov %cr2, %rax
    mov %rax, LONG_STATE + 8 * 24
    mov %dr6, %rax
    mov %rax, LONG_STATE + 8 * 26
    mov %cr0, %rax
    mov %rax, LONG_STATE + 8 * 27
    mov saved_cr3, %rax
    mov %rax, %cr3
    mov saved_cr4, %rax
    mov %rax, %cr4
    mov saved_cr0, %rax
    mov %rax, %cr0
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov saved_rsp, %rsp
    give_back_own

long_handle:
    push %rdx
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    push %rbp
    mov %rsp, %rbp
    lea 8 * 10(%rbp), %rdi
    sub $512, %rsp
    and $-16, %rsp
    fxsave64 (%rsp)
    cld
    call *%rax
    fxrstor64 (%rsp)
    mov %rbp, %rsp
    pop %rbp
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq

long_unexpected:
    lea 16(%rsp), %rdi
    and $-16, %rsp
    call guest_unexpected_event

.bss
.balign 16
.globl LONG_STATE
LONG_STATE:
    .fill 8 * 32
saved_rsp:
    .fill 8
saved_cr0:
    .fill 8
saved_cr3:
    .fill 8
saved_cr4:
    .fill 8
.globl long_catching
long_catching:
    .fill 8
.globl long_handlers
long_handlers:
    .fill 8 * 256
