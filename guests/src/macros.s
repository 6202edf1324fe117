// What several of the files behind this one do.

// Saves what a function must leave as it was, and the flags.
.macro save_own
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    pushfq
.endm

// Gives that back, and returns.
.macro give_back_own
    popfq
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret
.endm

// The kernel's data segment in all data segment registers. Changes EAX.
.macro load_kernel_data
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %eax, %fs
    mov %eax, %gs
.endm

// Outside long mode, between the processor and `legacy::State`: the general registers but EAX and ESP; and with them the
// data segment registers but DS.
.macro load_general
    mov s_ecx, %ecx
    mov s_edx, %edx
    mov s_ebx, %ebx
    mov s_ebp, %ebp
    mov s_esi, %esi
    mov s_edi, %edi
.endm

.macro store_general_and_segments
    mov %ecx, s_ecx
    mov %edx, s_edx
    mov %ebx, s_ebx
    mov %ebp, s_ebp
    mov %esi, s_esi
    mov %edi, s_edi
    mov %es, s_es
    mov %fs, s_fs
    mov %gs, s_gs
.endm

// DR6, DR7 and CR0, which it leaves in EAX.
.macro store_debug_and_cr0
    mov %dr6, %eax
    mov %eax, s_dr6
    mov %dr7, %eax
    mov %eax, s_dr7
    mov %cr0, %eax
    mov %eax, s_cr0
.endm
