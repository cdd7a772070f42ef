//! Prefetching along the stream of sections that a piece of work will read.

use super::simd::Simd;

/// Bytes of a cache line.
const LINE: usize = 64;

/// A cursor that runs ahead of the reader by a constant number of bytes, over the borders of
/// sections: blocks lie anywhere in memory, so the hardware's prefetchers stop at each.
pub(crate) struct Ahead<'a> {
    cursor: *const u8,
    end: *const u8,
    sections: &'a mut dyn FnMut() -> Option<*const [u8]>,
}

impl<'a> Ahead<'a> {
    /// A cursor over these sections.
    pub(crate) fn new(sections: &'a mut dyn FnMut() -> Option<*const [u8]>) -> Self {
        let mut ahead = Self { cursor: std::ptr::null(), end: std::ptr::null(), sections };
        ahead.turn();
        ahead
    }

    /// Asks for the next `bytes` bytes.
    #[inline(always)]
    pub(crate) fn advance<S: Simd>(&mut self, simd: S, bytes: usize) {
        let mut offset = 0;
        while offset < bytes {
            simd.prefetch(self.cursor.wrapping_add(offset));
            offset += LINE;
        }
        self.cursor = self.cursor.wrapping_add(bytes);
        if self.cursor >= self.end {
            self.turn();
        }
    }

    /// Goes to the next section. After the last one the cursor stays at its end, where asking
    /// again and again for a few lines costs little.
    #[cold]
    #[inline(never)]
    fn turn(&mut self) {
        let over = self.cursor.addr() - self.end.addr();
        match (self.sections)() {
            Some(section) => {
                let start = section.cast::<u8>();
                self.cursor = start.wrapping_add(over.min(section.len()));
                self.end = start.wrapping_add(section.len());
            }
            None => self.end = std::ptr::without_provenance(usize::MAX),
        }
    }
}
