# A boot sector that shows that firmware reads and writes the disk: it prints the text in sector 1 on the serial port,
# writes sector 2 with a copy of it, prints "written", and restarts the machine for each byte that it is sent.
# Sectors are addressed by the extended calls of int 13h (EDD); a failed call prints "failed".

    .intel_syntax noprefix
    .code16
    .globl _start
_start:
    ljmp 0, offset begin
begin:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    cld
    mov [drive], dl

    mov ah, 0x42                # read sector 1
    call disk
    mov si, offset buffer
    call print

    mov byte ptr [lba], 2       # write sector 2
    mov ax, 0x4300
    call disk
    mov si, offset written
    call print

    sti
wait:
    hlt                         # to the next tick of the clock
    mov dx, 0x3fd
    in al, dx
    test al, 1
    jz wait
    mov dx, 0x3f8
    in al, dx
    mov al, 0xfe                # the keyboard controller resets the machine
    out 0x64, al
stop:
    hlt
    jmp stop

disk:                           # ah: the call, on the sector of the packet
    mov dl, [drive]
    mov si, offset packet
    int 0x13
    jnc done
    mov si, offset failed
    call print
    jmp stop
done:
    ret

print:                          # the zero-terminated text at si
    lodsb
    test al, al
    jz done
    mov ah, al
room:
    mov dx, 0x3fd
    in al, dx
    test al, 0x20
    jz room
    mov dx, 0x3f8
    mov al, ah
    out dx, al
    jmp print

drive:
    .byte 0
written:
    .asciz "written\n"
failed:
    .asciz "failed\n"
    .balign 4
packet:                         # struct disk_address_packet
    .byte 16, 0
    .word 1                     # sectors
    .word buffer, 0             # offset, segment
lba:
    .quad 1

    .org 510
    .word 0xaa55
buffer:
