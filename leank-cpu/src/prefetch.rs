//! Whether to ask for memory before it is read, or leave that to the hardware.

/// How kernels ask for memory before they read it.
///
/// Reading a long cache is a few streams of consecutive bytes, which hardware prefetchers are made for.
/// How well they do that differs: on a Zen 4 they reach the memory's limit of 32 GB/s by themselves,
/// and asking for every line gives 18; on a Zen 5 they leave kernels waiting, and asking for every line
/// makes these up to twice as fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Prefetch {
    /// Where reading jumps to: the hardware's prefetchers go on from there.
    Jumps,
    /// Every line, 8 KiB ahead.
    Everything,
}

impl Prefetch {
    /// What is faster on this CPU, as far as it was measured: [`Prefetch::Everything`] on AMD's Zen 5,
    /// [`Prefetch::Jumps`] elsewhere.
    #[must_use]
    pub fn best() -> Self {
        if is_zen_5() { Self::Everything } else { Self::Jumps }
    }
}

// Miri has no instruction for it.
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn is_zen_5() -> bool {
    use std::arch::x86_64::__cpuid;
    let vendor = __cpuid(0);
    let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    let version = __cpuid(1).eax;
    let family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
    name.as_flattened() == b"AuthenticAMD" && family == 0x1a
}

#[cfg(any(not(target_arch = "x86_64"), miri))]
fn is_zen_5() -> bool {
    false
}
