//! Interrupt controllers: PIC, IOAPIC and local APIC.
