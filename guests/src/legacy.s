// Outside long mode: running a snippet in 32- or 16-bit protected mode, virtual-8086 mode or real mode from a state of
// all registers until an event, and coming back.
//
// Offsets within `legacy::State`: see there. GDT entries 08 (code) and 10 (data) are flat, 18 (code) and 20 (data) are
// segments of 64 KiB at 0.

.section .low, "awx"
.balign 16
.globl LEGACY_STATE
LEGACY_STATE:
    .fill 4 * 48
.set s_eax, LEGACY_STATE
.set s_ecx, LEGACY_STATE + 4
.set s_edx, LEGACY_STATE + 8
.set s_ebx, LEGACY_STATE + 12
.set s_esp, LEGACY_STATE + 16
.set s_ebp, LEGACY_STATE + 20
.set s_esi, LEGACY_STATE + 24
.set s_edi, LEGACY_STATE + 28
.set s_eip, LEGACY_STATE + 32
.set s_eflags, LEGACY_STATE + 36
.set s_cs, LEGACY_STATE + 40
.set s_ss, LEGACY_STATE + 44
.set s_ds, LEGACY_STATE + 48
.set s_es, LEGACY_STATE + 52
.set s_fs, LEGACY_STATE + 56
.set s_gs, LEGACY_STATE + 60
.set s_cr0, LEGACY_STATE + 64
.set s_cr2, LEGACY_STATE + 68
.set s_cr3, LEGACY_STATE + 72
.set s_cr4, LEGACY_STATE + 76
.set s_dr6, LEGACY_STATE + 80
.set s_tr, LEGACY_STATE + 84
.set s_ldtr, LEGACY_STATE + 88
.set s_vector, LEGACY_STATE + 92
.set s_error, LEGACY_STATE + 96
.set s_real, LEGACY_STATE + 100         // the selector that gives real mode's data segments their limits; or 0
.set s_plain, LEGACY_STATE + 104        // the event pushes no error code, whatever its vector
.set s_gdtr, LEGACY_STATE + 108         // limit in the upper half, base
.set s_idtr, LEGACY_STATE + 116
.set s_dr7, LEGACY_STATE + 124
.set s_pointer, LEGACY_STATE + 132      // ESP and SS again, for LSS
.set s_frame, LEGACY_STATE + 128        // ESP of the event's frame: where the instruction pointer is

saved_long: .fill 8 * 8
.set l_rsp, saved_long
.set l_cr0, saved_long + 8
.set l_cr3, saved_long + 16
.set l_cr4, saved_long + 24
.set l_tr, saved_long + 32
.set l_gdtr, saved_long + 40
.set l_idtr, saved_long + 52
    .fill 1024
low_stack_end:

.code64
.globl legacy_run
legacy_run:
    save_own
    cli
    cld
    mov %rsp, l_rsp
    mov %cr0, %rax
    mov %rax, l_cr0
    mov %cr3, %rax
    mov %rax, l_cr3
    mov %cr4, %rax
    mov %rax, l_cr4
    str l_tr
    sgdt l_gdtr
    sidt l_idtr
    mov $low_stack_end, %esp
    push $0x18
    push $1f
    lretq
.code32
1:  mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %cr0, %eax
    and $0x7fffffff, %eax
    mov %eax, %cr0
    mov $0xc0000080, %ecx
    rdmsr
    and $~0x100, %eax
    wrmsr
    mov s_cr4, %eax
    mov %eax, %cr4
    mov s_cr3, %eax
    mov %eax, %cr3
    lgdt s_gdtr + 2
    lidt s_idtr + 2
    ljmp $0x08, $1f
1:  load_kernel_data
    cmpl $0, s_real
    jne enter_real
    mov s_cr0, %eax
    mov %eax, %cr0
    jmp 1f
1:  lldt s_ldtr
    cmpw $0, s_tr
    je 1f
    ltr s_tr
1:  mov s_dr7, %eax
    mov %eax, %dr7
    testl $0x20000, s_eflags
    jnz 3f
    testb $3, s_cs
    jnz 2f
    lss s_pointer, %esp
    jmp 4f
3:  pushl s_gs
    pushl s_fs
    pushl s_ds
    pushl s_es
2:  pushl s_ss
    pushl s_esp
4:  pushl s_eflags
    pushl s_cs
    pushl s_eip
    testl $0x20000, s_eflags
    jnz 5f
    mov s_es, %es
    mov s_fs, %fs
    mov s_gs, %gs
5:  load_general
    mov s_eax, %eax
    testl $0x20000, s_eflags
    jnz 6f
    mov s_ds, %ds
6:  iretl

// One entry of 16 bytes for each vector.
.balign 16
.globl legacy_entries
legacy_entries:
    .set vector, 0
    .rept 256
    .balign 16
    .byte 0x68                      // push $vector
    .long vector
    .byte 0xe9                      // jmp
    .long legacy_event - . - 4
    .set vector, vector + 1
    .endr

legacy_event:
    push %eax
    push %ds
    mov $0x10, %eax
    mov %eax, %ds
    store_general_and_segments
    popl s_ds
    popl s_eax
    popl s_vector
    mov s_vector, %ecx
    movl $0, s_error
    cmpb $0, s_plain
    jne 1f
    cmp $32, %ecx
    jae 1f
    mov $0x00227d00, %eax           // the vectors with an error code
    bt %ecx, %eax
    jnc 1f
    popl s_error
1:  mov %esp, s_frame
    popl s_eip
    popl s_cs
    popl s_eflags
    testl $0x20000, s_eflags
    jnz 3f
    testb $3, s_cs
    jz 2f
    popl s_esp
    popl s_ss
    jmp legacy_leave
2:  mov %esp, s_esp
    mov %ss, s_ss
    jmp legacy_leave
3:  popl s_esp
    popl s_ss
    popl s_es
    popl s_ds
    popl s_fs
    popl s_gs

// Records the control registers, and returns to long mode.
.globl legacy_leave
legacy_leave:
    cli
    mov %cr2, %eax
    mov %eax, s_cr2
    store_debug_and_cr0
    mov %cr3, %eax
    mov %eax, s_cr3
    movl $0, s_tr
    movl $0, s_ldtr
    str s_tr
    sldt s_ldtr
    // Long mode is not entered with a 16-bit TSS.
    lgdt s_gdtr + 2
    mov s_gdtr + 4, %ebx
    mov s_tr, %eax
    movb 5(%ebx, %eax), %cl
    and $0xf, %cl
    cmp $3, %cl
    jne back_to_long
    andb $~2, 0x38 + 5(%ebx)
    mov $0x38, %eax
    ltr %ax
back_to_long:
    mov $0x400, %eax
    mov %eax, %dr7
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x33, %eax
    mov %eax, %cr0
    jmp 1f
1:  mov l_cr4, %eax
    mov %eax, %cr4
    mov l_cr3, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    mov l_cr0, %eax
    mov %eax, %cr0
    lgdt l_gdtr
    ljmp $0x08, $1f
.code64
1:  lgdt l_gdtr
    lidt l_idtr
    xor %eax, %eax
    lldt %ax
    mov l_gdtr + 2, %rax
    movzwl l_tr, %ecx
    test %ecx, %ecx
    jz 1f
    andb $~2, 5(%rax, %rcx)
    ltr %cx
1:  load_kernel_data
    mov l_rsp, %rsp
    give_back_own

// Where a task gate for an event with an error code leads to: the vector is in EAX of its TSS.
.code32
.globl legacy_task_error
legacy_task_error:
    popl s_error
    mov %eax, s_vector
    jmp legacy_leave
// The same for an event without one.
.globl legacy_task_plain
legacy_task_plain:
    mov %eax, s_vector
    jmp legacy_leave

enter_real:
    mov s_real, %edx
    mov s_dr7, %eax
    mov %eax, %dr7
    ljmp $0x18, $1f
.code16
1:  mov $0x20, %ax
    mov %ax, %ss
    mov %dx, %ds
    mov %dx, %es
    mov %dx, %fs
    mov %dx, %gs
    mov s_cr0, %eax
    mov %eax, %cr0
    ljmp $0, $1f
1:  xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $low_stack_end, %sp
    lidtl s_idtr + 2
    mov s_ss, %ss
    mov s_esp, %esp
    pushl s_eflags
    pushl s_cs
    pushl s_eip
    mov s_es, %es
    mov s_fs, %fs
    mov s_gs, %gs
    load_general
    mov s_eax, %eax
    mov s_ds, %ds
    iretl

.balign 16
.globl real_entries
real_entries:
    .set vector, 0
    .rept 256
    .byte 0x68                      // push $vector
    .word vector
    .byte 0xe9                      // jmp
    .word real_event - . - 2
    .set vector, vector + 1
    .endr

real_event:
    pushl %eax
    push %ds
    xor %ax, %ax
    mov %ax, %ds
    store_general_and_segments
    popw s_ds
    popl s_eax
    movl $0, s_vector
    popw s_vector
    movl $0, s_error
    movzwl %sp, %eax
    mov %eax, s_frame
    movl $0, s_eip
    movl $0, s_eflags
    popw s_eip
    popw s_cs
    popw s_eflags
    mov %esp, s_esp
    mov %ss, s_ss
    cli
    store_debug_and_cr0
    or $1, %eax
    and $0x7fffffff, %eax
    lgdtl s_gdtr + 2
    mov %eax, %cr0
    ljmpl $0x08, $back_to_long
