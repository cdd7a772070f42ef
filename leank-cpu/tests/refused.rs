//! Memory that the system refuses: alone in its process, whose allocator refuses it.

mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::Arc,
};

use leank_cpu::{Cpu, Isa, Serial};
use support::OnCpu;

thread_local! {
    /// Allocations of blocks that succeed before one does not.
    static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The system's memory, of which blocks do not always get some: their storage alone is zeroed and aligned
/// to cache lines.
struct Refusing;

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

// SAFETY: it hands on what the system's allocator gives, or null, which any allocator may return. It
// allocates nothing itself: the thread's number is neither made nor dropped by code.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise; all memory is the system's.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.align() >= 64 {
            let left = LEFT.get();
            // After 0 come as many as there will never be.
            LEFT.set(left.wrapping_sub(1));
            if left == 0 {
                return std::ptr::null_mut();
            }
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
}

#[test]
fn refused_memory_changes_nothing() {
    let cpu = Cpu::with_executor(Arc::new(Serial)).with_isa(Isa::Portable).unwrap();
    // Each is lived as often as it asks for memory.
    let cpu = OnCpu { cases: 8, ..OnCpu::new(cpu) };
    leank_testkit::refused_memory_changes_nothing(&cpu, |after| LEFT.set(after));
}
