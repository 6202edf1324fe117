//! Feature bits of rings and transports. *Reserved Feature Bits*.

/// Descriptors may point to tables of descriptors.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Each side tells at which entry it wants to be notified.
pub const EVENT_IDX: u64 = 1 << 29;
/// The device follows this specification, not what was before it.
pub const VERSION_1: u64 = 1 << 32;
/// Packed rings.
pub const RING_PACKED: u64 = 1 << 34;
/// The device uses buffers in the order in which they were made available, so that the driver need not look up which of
/// them came back. Devices offer it whose requests end in their order anyway; one that works on several at a time, a disk
/// or a shared folder, would make each wait for those before it, which costs more than the driver saves.
pub const IN_ORDER: u64 = 1 << 35;
/// The driver's notifications tell how far its ring is filled. That saves a device a read across a bus; here the ring is
/// in the same memory, and is read anyway, because only it tells what came since the notification: the number of the queue
/// is all that is taken of it.
pub const NOTIFICATION_DATA: u64 = 1 << 38;

/// The features of rings that can be withheld, with the names by which users know them.
pub const OPTIONAL: [(&str, u64); 5] = [
    ("packed", RING_PACKED),
    ("event-idx", EVENT_IDX),
    ("indirect", INDIRECT_DESC),
    ("in-order", IN_ORDER),
    ("notification-data", NOTIFICATION_DATA),
];

/// What every device here offers.
pub const OFFERED: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_PACKED | NOTIFICATION_DATA;
