// Entry from a Multiboot loader, and of the other processors; both end in long mode with SSE, on the identity map.

.section .multiboot, "a"
.balign 4
.long 0x1badb002, 2, -(0x1badb002 + 2)

.section .text.start, "ax"
.code32
.globl _start
_start:
    cli
    cld
    mov $boot_stack_end, %esp
    mov %ebx, multiboot_info
    mov $low_load, %esi
    mov $low_start, %edi
    mov $low_end, %ecx
    sub %edi, %ecx
    rep movsb
    call enter_long_mode
.code64
    xor %ebp, %ebp
    xor %edi, %edi
    call guest_start
2:  hlt
    jmp 2b

// Switches from flat 32-bit mode without paging to 64-bit mode, and returns there.
.code32
.globl enter_long_mode
enter_long_mode:
    mov $0x620, %eax                // PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $identity_pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x901, %eax                 // NXE, LME, SCE
    wrmsr
    mov $0x80010033, %eax           // PG, WP, NE, ET, MP, PE
    mov %eax, %cr0
    lgdt boot_gdtr
    pop %edx
    ljmp $0x08, $1f
.code64
1:  load_kernel_data
    mov %edx, %edx
    fninit
    jmp *%rdx

// What another processor executes at its start-up: the page's number is the vector of the start-up IPI.
.section .low, "awx"
.balign 4096
.code16
.globl ap_entry
ap_entry:
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl boot_gdtr_low
    mov %cr0, %eax
    and $0x9fffffff, %eax           // INIT leaves CD and NW set
    or $1, %eax
    mov %eax, %cr0
    ljmpl $0x18, $1f
.code32
1:  mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    // Each takes the next stack.
    mov $1, %eax
    lock xadd %eax, ap_started
    inc %eax
    mov %eax, %ebp
    imul $0x8000, %eax, %esp
    add $ap_stacks, %esp
    call enter_long_mode
.code64
    mov %ebp, %edi
    xor %ebp, %ebp
    call guest_ap_start
2:  hlt
    jmp 2b
.balign 8
boot_gdtr_low:
    .word 0x7f
    .long boot_gdt

.data
.balign 8
.globl boot_gdtr
boot_gdtr:
    .word 0x7f
    .quad boot_gdt
.globl multiboot_info
multiboot_info:
    .long 0
.globl ap_started
ap_started:
    .long 0
.balign 8
// The selectors of `tables::selector`.
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff        // 08 code, 64 bits
    .quad 0x00cf93000000ffff        // 10 data
    .quad 0x00cf9b000000ffff        // 18 code, 32 bits
    .quad 0x00009b000000ffff        // 20 code, 16 bits
    .quad 0x000093000000ffff        // 28 data, 64 KiB
    .fill 10, 8, 0

// The first 4 GiB, each address itself, open to all privilege levels.
.balign 4096
.globl identity_pml4
identity_pml4:
    .quad identity_pdpt + 7
    .fill 511, 8, 0
identity_pdpt:
    .quad identity_pd + 7, identity_pd + 0x1007, identity_pd + 0x2007, identity_pd + 0x3007
    .fill 508, 8, 0
.globl identity_pd
identity_pd:
    .set frame, 0
    .rept 2048
    .quad frame + 0x87
    .set frame, frame + 0x200000
    .endr

.bss
.balign 16
.fill 0x10000
boot_stack_end:
.globl ap_stacks
ap_stacks:
.fill 0x8000 * 17
