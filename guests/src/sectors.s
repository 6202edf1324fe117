// Boot sectors: 512 bytes each, loaded at 0x7c00 and entered in real mode, as a PC's firmware does. What they found is
// in AX at their end, INT 0x30: 0 where all was right, else the number of what was not.

.section .rodata.sectors, "a"

// Moves itself to 0x600 as a master boot record does, goes on there, and sums up its own bytes.
.code16
.globl sector_moves
sector_moves:
    cli
    cld
    xor %ax, %ax
    mov %ax, %ss
    mov $0x7c00, %sp
    mov %ax, %ds
    mov %ax, %es
    mov %sp, %si
    mov $0x600, %di
    mov $256, %cx
    rep movsw
    .byte 0xea                      // ljmp 0:there
    .word 1f - sector_moves + 0x600, 0
1:  mov $1, %bx
    cmpw $0xaa55, 0x7fe - 0
    jne 9f
    inc %bx                         // 2: both copies are equal
    mov $0x600, %si
    mov $0x7c00, %di
    mov $512, %cx
    repe cmpsb
    jne 9f
    inc %bx                         // 3: IP is here, as CALL pushes it
    .byte 0xe8, 0, 0
2:  pop %ax
    cmp $2b - sector_moves + 0x600, %ax
    jne 9f
    inc %bx                         // 4: a subroutine through a table
    mov $table - sector_moves + 0x600, %si
    mov $3, %cx
    xor %dx, %dx
3:  lodsw
    call *%ax
    loop 3b
    cmp $0x123, %dx
    jne 9f
    inc %bx                         // 5: the partition table's first entry is active
    mov $0x7be, %bp
    cmpb $0x80, %ds:(%bp)
    jne 9f
    xor %bx, %bx
9:  mov %bx, %ax
    int $0x30
first:
    add $0x100, %dx
    .byte 0xc3
second:
    add $0x20, %dx
    .byte 0xc3
third:
    add $0x3, %dx
    .byte 0xc3
table:
    .word first - sector_moves + 0x600, second - sector_moves + 0x600, third - sector_moves + 0x600
    .org sector_moves + 0x1be
    .byte 0x80
    .org sector_moves + 510
    .word 0xaa55

// Enters protected mode by a GDT of its own, moves memory beyond 1 MiB, and comes back to real mode.
.globl sector_protected
sector_protected:
    cli
    cld
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $0x7c00, %sp
    movw $1, result
    // A20: 0:0x500 and 0xffff:0x510 are different bytes.
    mov $0xffff, %ax
    mov %ax, %es
    movb $0x11, 0x500
    movb $0x22, %es:0x510
    cmpb $0x11, 0x500
    jne 9f
    incw result                     // 2
    lgdtl pointer - sector_protected + 0x7c00
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    .byte 0x66, 0xea                // ljmpl 8:there
    .long 1f - sector_protected + 0x7c00
    .word 8
.code32
1:  mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x9000, %esp
    mov $0x7c00, %esi
    mov $0x900000, %edi
    mov $128, %ecx
    rep movsl
    mov $0x7c00, %esi
    mov $0x900000, %edi
    mov $128, %ecx
    repe cmpsl
    jne 2f
    incl result                     // 3
    // Factorial of 12, by calls.
    mov $12, %ecx
    call factorial
    cmp $479001600, %eax
    jne 2f
    incl result                     // 4
2:  .byte 0xea                      // ljmp 0x18:there
    .long 3f - sector_protected + 0x7c00
    .word 0x18
.code16
3:  mov $0x20, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov %cr0, %eax
    and $0xfe, %al
    mov %eax, %cr0
    .byte 0xea                      // ljmp 0:there
    .word 4f - sector_protected + 0x7c00, 0
4:  xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7c00, %sp
    cmpw $4, result
    jne 9f
    movw $0, result
9:  mov result, %ax
    int $0x30
.code32
factorial:
    cmp $1, %ecx
    jbe 1f
    push %ecx
    dec %ecx
    call factorial
    pop %ecx
    imul %ecx, %eax
    ret
1:  mov $1, %eax
    ret
.code16
.set result, 0x520
    .balign 4
descriptors:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00009b000000ffff, 0x000093000000ffff
pointer:
    .word 39
    .long descriptors - sector_protected + 0x7c00
    .org sector_protected + 510
    .word 0xaa55

// Hooks the timer's interrupt, counts ticks while it halts, chains to the handler before, and unhooks it.
.globl sector_hooks
sector_hooks:
    cli
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $0x7c00, %sp
    movw $0, ticks
    movw $0, chained
    // A handler that was there before.
    movw $old - sector_hooks + 0x7c00, 4 * 8
    movw $0, 4 * 8 + 2
    mov 4 * 8, %eax
    mov %eax, saved
    movw $new - sector_hooks + 0x7c00, 4 * 8
    // The first 8259 at vector 8, its timer alone; the 8254 at 1,000 Hz.
    mov $0x11, %al
    out %al, $0x20
    mov $8, %al
    out %al, $0x21
    mov $4, %al
    out %al, $0x21
    mov $1, %al
    out %al, $0x21
    mov $0xfe, %al
    out %al, $0x21
    mov $0x34, %al
    out %al, $0x43
    mov $0xa9, %al
    out %al, $0x40
    mov $4, %al
    out %al, $0x40
1:  sti
    hlt
    cli
    cmpw $10, ticks
    jb 1b
    mov $0xff, %al
    out %al, $0x21
    mov saved, %eax
    mov %eax, 4 * 8
    mov ticks, %ax
    sub chained, %ax
    int $0x30
new:
    push %ds
    push %ax
    xor %ax, %ax
    mov %ax, %ds
    incw ticks
    pop %ax
    pop %ds
    ljmp *%cs:saved
old:
    push %ds
    push %ax
    xor %ax, %ax
    mov %ax, %ds
    incw chained
    mov $0x20, %al
    out %al, $0x20
    pop %ax
    pop %ds
    iretw
.set ticks, 0x530
.set chained, 0x532
.set saved, 0x534
    .org sector_hooks + 510
    .word 0xaa55
.code64
