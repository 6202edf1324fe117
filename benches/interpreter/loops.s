# The loops of the interpreter benchmark: data at rdi, turns in rsi (at least one). Every label is local to its function.
    .text

    .p2align 6
loop_alu:
    mov eax, 1
    mov ecx, 2
    mov edx, 3
    mov r8d, 4
1:  add rax, rcx
    sub rdx, rax
    xor r8, rdx
    lea r9, [rax + 4*rcx + 7]
    and r9, rdx
    or rcx, 1
    add eax, 12345
    cmp rax, r8
    mov r10, r9
    inc r10
    add r8, r10
    not rdx
    dec rsi
    jnz 1b
    ret
loop_alu_end:

    .p2align 6
loop_mul:
    mov eax, 12345
    mov r8d, 77
1:  imul r8, rax
    shl rax, 3
    rol r8, 5
    shr r8, 1
    imul eax, eax, 31
    mov ecx, esi
    sar r8, cl
    add r8, rsi
    mov r9, rax
    mul r8
    mov rax, r9
    dec rsi
    jnz 1b
    ret
loop_mul_end:

    .p2align 6
loop_load_store:
    xor ecx, ecx
1:  mov rax, [rdi + rcx]
    add rax, [rdi + rcx + 8]
    mov [rdi + rcx + 16], rax
    add qword ptr [rdi + rcx + 24], 1
    mov edx, [rdi + rcx + 32]
    mov [rdi + rcx + 36], edx
    movzx r8d, byte ptr [rdi + rcx + 40]
    mov [rdi + rcx + 41], r8b
    add ecx, 64
    and ecx, 0xfc0
    dec rsi
    jnz 1b
    ret
loop_load_store_end:

    .p2align 6
loop_byte_copy:
    xor ecx, ecx
1:  movzx eax, byte ptr [rdi + rcx]
    mov [rdi + rcx + 0x2000], al
    inc ecx
    and ecx, 0xfff
    dec rsi
    jnz 1b
    ret
loop_byte_copy_end:

    .p2align 6
loop_call:
1:  call 2f
    call 2f
    dec rsi
    jnz 1b
    ret
2:  push rsi
    call 3f
    pop rsi
    ret
3:  mov eax, esi
    ret
loop_call_end:

    .p2align 6
loop_predictable:
    xor eax, eax
1:  test esi, esi
    js 2f
    inc eax
    cmp eax, 0
    je 2f
    inc ecx
2:  jmp 3f
    nop
3:  dec rsi
    jnz 1b
    ret
loop_predictable_end:

    .p2align 6
loop_unpredictable:
    mov eax, 12345
1:  imul eax, eax, 1103515245
    add eax, 12345
    test eax, 0x10000
    jz 2f
    inc ecx
2:  test eax, 0x200000
    jnz 3f
    inc edx
3:  dec rsi
    jnz 1b
    ret
loop_unpredictable_end:

    .p2align 6
loop_indirect:
    xor ecx, ecx
    mov eax, 12345
    lea r8, [rip + 10f]
1:  imul eax, eax, 1103515245
    add eax, 12345
    mov edx, eax
    shr edx, 28
    and edx, 3
    movsxd r9, dword ptr [r8 + 4*rdx]
    add r9, r8
    jmp r9
2:  add ecx, 1
    jmp 6f
3:  sub ecx, 5
    jmp 6f
4:  xor ecx, edx
    jmp 6f
5:  lea ecx, [rcx + rdx]
6:  dec rsi
    jnz 1b
    ret
    .p2align 2
10: .long 2b - 10b, 3b - 10b, 4b - 10b, 5b - 10b
loop_indirect_end:

    .p2align 6
loop_movsb:
    mov r8, rdi
    mov r9, rsi
1:  mov rsi, r8
    lea rdi, [r8 + 0x2000]
    mov ecx, 4096
    rep movsb
    dec r9
    jnz 1b
    ret
loop_movsb_end:

    .p2align 6
loop_stosq:
    mov r8, rdi
    xor eax, eax
1:  mov rdi, r8
    mov ecx, 512
    rep stosq
    dec rsi
    jnz 1b
    ret
loop_stosq_end:

    .p2align 6
loop_locked:
    mov ecx, 1
1:  mov eax, 3
    lock xadd [rdi], rax
    mov rax, [rdi + 8]
    lock cmpxchg [rdi + 8], rcx
    lock inc qword ptr [rdi + 16]
    dec rsi
    jnz 1b
    ret
loop_locked_end:

    .p2align 6
loop_pages:
    xor ecx, ecx
1:  mov rax, [rdi + rcx]
    add ecx, 0x1040
    and ecx, 0x3ffffc0
    dec rsi
    jnz 1b
    ret
loop_pages_end:

    .p2align 6
loop_sse:
    xor ecx, ecx
    pxor xmm1, xmm1
    pxor xmm2, xmm2
1:  movdqu xmm0, [rdi + rcx]
    paddd xmm1, xmm0
    pxor xmm2, xmm1
    pshufd xmm3, xmm2, 0x1b
    mulps xmm0, xmm0
    addps xmm0, xmm3
    movdqu [rdi + rcx + 0x2000], xmm0
    add ecx, 16
    and ecx, 0xff0
    dec rsi
    jnz 1b
    ret
loop_sse_end:

    .p2align 6
loop_avx2:
    xor ecx, ecx
    vpxor ymm1, ymm1, ymm1
    vpxor ymm2, ymm2, ymm2
1:  vmovdqu ymm0, [rdi + rcx]
    vpaddd ymm1, ymm1, ymm0
    vpxor ymm2, ymm2, ymm1
    vpermq ymm3, ymm2, 0x1b
    vmulps ymm0, ymm0, ymm0
    vaddps ymm0, ymm0, ymm3
    vmovdqu [rdi + rcx + 0x2000], ymm0
    add ecx, 32
    and ecx, 0xfe0
    dec rsi
    jnz 1b
    vzeroupper
    ret
loop_avx2_end:

    .p2align 6
loop_x87:
    fld1
    fldz
1:  fadd st(0), st(1)
    fld st(0)
    fmul st(0), st(1)
    fstp qword ptr [rdi]
    fld qword ptr [rdi]
    fsqrt
    fstp st(1)
    dec rsi
    jnz 1b
    fstp st(0)
    fstp st(0)
    ret
loop_x87_end:

    .p2align 6
loop_cpuid:
    mov r8, rbx
1:  xor eax, eax
    xor ecx, ecx
    cpuid
    dec rsi
    jnz 1b
    mov rbx, r8
    ret
loop_cpuid_end:

    .p2align 6
loop_rdtsc:
1:  rdtsc
    dec rsi
    jnz 1b
    ret
loop_rdtsc_end:

    .p2align 6
loop_port:
    mov edx, 0x3fd
1:  in al, dx
    dec rsi
    jnz 1b
    ret
loop_port_end:

    .p2align 6
loop_cr3:
    mov rax, cr3
1:  mov cr3, rax
    mov rcx, [rdi]
    mov rcx, [rdi + 0x1000]
    mov rcx, [rdi + 0x2000]
    mov rcx, [rdi + 0x3000]
    mov rcx, [rdi + 0x4000]
    mov rcx, [rdi + 0x5000]
    mov rcx, [rdi + 0x6000]
    mov rcx, [rdi + 0x7000]
    dec rsi
    jnz 1b
    ret
loop_cr3_end:
