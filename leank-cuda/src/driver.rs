//! The driver's calls that the cache needs and cudarc's safe layer does not offer: plain device
//! memory, copies from and to parts of it, launches with one parameter struct.

use std::{ffi::c_void, sync::Arc};

use bytemuck::Pod;
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaStream, DriverError, result,
    sys::{
        CUfunction_attribute_enum, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
        CUlaunchConfig, CUresult, cuLaunchKernelEx,
    },
};

/// Result of a driver's call.
pub(crate) type Driver<T> = Result<T, DriverError>;

/// Whether the driver had no memory to give.
pub(crate) fn is_out_of_memory(error: DriverError) -> bool {
    error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY
}

/// Device memory.
#[derive(Debug)]
pub(crate) struct Buffer {
    context: Arc<CudaContext>,
    allocation: u64,
    address: u64,
    bytes: usize,
}

/// Slabs start at a multiple of this many bytes.
pub(crate) const ALIGN: u64 = 1 << 16;

impl Buffer {
    /// Memory that nothing was written to, at a multiple of 256 bytes.
    pub(crate) fn new(context: &Arc<CudaContext>, bytes: usize) -> Driver<Self> {
        context.bind_to_thread()?;
        #[cfg(test)]
        crate::faults::pass(crate::faults::Call::Allocate)?;
        // SAFETY: the context is current. Any bytes are valid: what kernels read unwritten they mask.
        let allocation = unsafe { result::malloc_sync(bytes.max(1)) }?;
        let context = Arc::clone(context);
        Ok(Self { context, allocation, address: allocation, bytes })
    }

    /// The same at a multiple of [`ALIGN`].
    pub(crate) fn aligned(context: &Arc<CudaContext>, bytes: usize) -> Driver<Self> {
        // Large allocations start at a page of 2 MiB; asking for more than is needed would take
        // another page.
        let mut buffer = Self::new(context, bytes)?;
        if !buffer.address.is_multiple_of(ALIGN) {
            buffer = Self::new(context, bytes + ALIGN as usize)?;
            buffer.address = buffer.address.next_multiple_of(ALIGN);
            buffer.bytes = bytes;
        }
        Ok(buffer)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Fills a part with a byte.
    ///
    /// # Panics
    /// When the range is not in the buffer.
    pub(crate) fn fill(
        &self,
        stream: &CudaStream,
        range: std::ops::Range<usize>,
        byte: u8,
    ) -> Driver<()> {
        assert!(range.start <= range.end && range.end <= self.bytes, "{range:?} of {}", self.bytes);
        if range.is_empty() {
            return Ok(());
        }
        self.context.bind_to_thread()?;
        #[cfg(test)]
        crate::faults::pass(crate::faults::Call::Copy)?;
        let at = self.address + range.start as u64;
        // SAFETY: the range was checked to be in this allocation, which is freed only after the
        // device is done with it.
        unsafe { result::memset_d8_async(at, byte, range.len(), stream.cu_stream()) }
    }

    /// Copies host bytes to the buffer from `offset` on, and waits.
    ///
    /// # Panics
    /// When they do not fit.
    pub(crate) fn write(&self, stream: &CudaStream, offset: usize, bytes: &[u8]) -> Driver<()> {
        assert!(offset + bytes.len() <= self.bytes, "{offset} + {} of {}", bytes.len(), self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        self.context.bind_to_thread()?;
        #[cfg(test)]
        crate::faults::pass(crate::faults::Call::Copy)?;
        let at = self.address + offset as u64;
        // SAFETY: the target was checked to be in this allocation; `bytes` lives until the
        // stream is waited for below.
        unsafe { result::memcpy_htod_async(at, bytes, stream.cu_stream()) }?;
        stream.synchronize()
    }

    /// Copies bytes of the buffer from `offset` on to the host, and waits.
    ///
    /// # Panics
    /// When they are not in the buffer.
    pub(crate) fn read(&self, stream: &CudaStream, offset: usize, bytes: &mut [u8]) -> Driver<()> {
        assert!(offset + bytes.len() <= self.bytes, "{offset} + {} of {}", bytes.len(), self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        self.context.bind_to_thread()?;
        #[cfg(test)]
        crate::faults::pass(crate::faults::Call::Copy)?;
        let at = self.address + offset as u64;
        // SAFETY: the source was checked to be in this allocation; `bytes` lives until the
        // stream is waited for below.
        unsafe { result::memcpy_dtoh_async(bytes, at, stream.cu_stream()) }?;
        stream.synchronize()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // Seldom: a cache goes, a table grew, no block of a slab is in use.
        self.context.record_err(self.context.synchronize());
        // SAFETY: the allocation is ours and freed once; the device is done with it.
        let freed = unsafe { result::free_sync(self.allocation) };
        self.context.record_err(freed);
    }
}

/// Pinned host memory that small tables go through to the device, without waiting for it: several
/// buffers in turn, each used again when its last copy is done.
#[derive(Debug)]
pub(crate) struct Staging {
    context: Arc<CudaContext>,
    buffers: [Option<Pinned>; 4],
    next: usize,
}

#[derive(Debug)]
struct Pinned {
    memory: *mut u8,
    bytes: usize,
    /// The end of the last copy out of it.
    copied: CudaEvent,
}

// SAFETY: the memory belongs to this value alone, and page-locked memory may be used and freed from
// any thread.
unsafe impl Send for Pinned {}
// SAFETY: it is written through `&mut` alone.
unsafe impl Sync for Pinned {}

impl Pinned {
    fn new(context: &Arc<CudaContext>, bytes: usize) -> Driver<Self> {
        context.bind_to_thread()?;
        #[cfg(test)]
        crate::faults::pass(crate::faults::Call::Allocate)?;
        let copied = context.new_event(None)?;
        // SAFETY: the context is current.
        let memory: *mut u8 = unsafe { result::malloc_host(bytes, 0) }?.cast();
        // SAFETY: `bytes` bytes were just allocated, and nobody else has them.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(Self { memory, bytes, copied })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let context = self.copied.context();
        context.record_err(self.copied.synchronize());
        // SAFETY: allocated by `malloc_host`, freed once; no copy out of it is under way.
        let freed = unsafe { result::free_host(self.memory.cast::<c_void>()) };
        context.record_err(freed);
    }
}

impl Staging {
    pub(crate) fn new(context: &Arc<CudaContext>) -> Self {
        Self { context: Arc::clone(context), buffers: [const { None }; 4], next: 0 }
    }

    /// Copies `parts` to a buffer, each to its offset, in stream order.
    ///
    /// # Panics
    /// When a part does not fit.
    pub(crate) fn upload(
        &mut self,
        stream: &CudaStream,
        to: &Buffer,
        parts: &[(usize, &[u8])],
    ) -> Driver<()> {
        let bytes = parts.iter().map(|(offset, part)| offset + part.len()).max().unwrap_or(0);
        assert!(bytes <= to.bytes, "{bytes} of {}", to.bytes);
        if bytes == 0 {
            return Ok(());
        }
        self.context.bind_to_thread()?;
        let slot = &mut self.buffers[self.next];
        self.next = (self.next + 1) % 4;
        if slot.as_ref().is_none_or(|pinned| pinned.bytes < bytes) {
            *slot = None;
            *slot = Some(Pinned::new(&self.context, bytes.next_power_of_two())?);
        }
        let Some(pinned) = slot else { return Ok(()) };
        pinned.copied.synchronize()?;
        // SAFETY: `bytes` bytes were allocated and written, nobody else has them, and the device is
        // done with them.
        let memory = unsafe { std::slice::from_raw_parts_mut(pinned.memory, bytes) };
        for (offset, part) in parts {
            memory[*offset..offset + part.len()].copy_from_slice(part);
        }
        #[cfg(test)]
        crate::faults::pass(crate::faults::Call::Copy)?;
        // SAFETY: both ends hold `bytes` bytes; the pinned memory is not touched before the event.
        unsafe { result::memcpy_htod_async(to.address, memory, stream.cu_stream()) }?;
        pinned.copied.record(stream)
    }
}

/// A kernel that takes one struct of parameters.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    function: CudaFunction,
    threads: u32,
    shared: u32,
    early: bool,
}

impl Kernel {
    /// A kernel that runs with so many threads per block and bytes of dynamic shared memory.
    pub(crate) fn new(function: CudaFunction, threads: u32, shared: usize) -> Driver<Self> {
        let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        if shared > 0 {
            function.set_attribute(most, i32::try_from(shared).unwrap_or(i32::MAX))?;
        }
        let shared = u32::try_from(shared).unwrap_or(u32::MAX);
        Ok(Self { function, threads, shared, early: false })
    }

    /// Whether the device can begin [`Kernel::launch_early`] early.
    pub(crate) fn beginning_early(self, early: bool) -> Self {
        Self { early, ..self }
    }

    /// Launches the kernel.
    ///
    /// # Safety
    /// `parameters` is the kernel's parameter struct; every address in it is that of device memory
    /// of the stream's context, as large as the kernel takes it for, that lives until the launch is
    /// done and that no other stream writes meanwhile.
    pub(crate) unsafe fn launch<P: Pod>(
        &self,
        stream: &CudaStream,
        grid: (u32, u32, u32),
        parameters: &P,
    ) -> Driver<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(stream, grid, parameters, false) }
    }

    /// Launches the kernel, which may begin before the launch before it in the stream has ended,
    /// where the device can do that; the kernel waits for it where it must.
    ///
    /// # Safety
    /// As [`Kernel::launch`]; and what the kernel reads before it waits was written by launches that
    /// came before the one before this.
    pub(crate) unsafe fn launch_early<P: Pod>(
        &self,
        stream: &CudaStream,
        grid: (u32, u32, u32),
        parameters: &P,
    ) -> Driver<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_with(stream, grid, parameters, self.early) }
    }

    /// # Safety
    /// As [`Kernel::launch`], or as [`Kernel::launch_early`] where it is early.
    unsafe fn launch_with<P: Pod>(
        &self,
        stream: &CudaStream,
        grid: (u32, u32, u32),
        parameters: &P,
        early: bool,
    ) -> Driver<()> {
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        stream.context().bind_to_thread()?;
        #[cfg(test)]
        crate::faults::pass(crate::faults::Call::Launch)?;
        let mut pointers = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
        let mut attribute = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: grid.0,
            gridDimY: grid.1,
            gridDimZ: grid.2,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(early),
        };
        let function = self.function.cu_function();
        // SAFETY: the function's module is loaded as long as `self` lives; the driver copies
        // configuration and parameters before it returns; for the rest see above.
        unsafe {
            cuLaunchKernelEx(
                &raw const config,
                function,
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
    }
}
