//! Activations in device memory.

use std::{marker::PhantomData, sync::Arc};

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr as _, DevicePtrMut as _};
use half::{bf16, f16};
use leank_core::{Dtype, Error, Result, ViewShape};

use crate::records;

/// Element types of activations.
pub trait Element: sealed::Sealed {
    /// The type's name in leank.
    const DTYPE: Dtype;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

#[derive(Clone, Copy, Debug)]
struct Place {
    address: u64,
    dtype: Dtype,
    shape: ViewShape,
    /// The stream that the memory belongs to, where it is known.
    stream: Option<usize>,
}

impl Place {
    fn record(&self) -> records::View {
        let bytes = self.dtype.bytes() as u64;
        let strides = [self.shape.token_stride, self.shape.head_stride].map(|stride| stride as u64);
        let unit = 16 / bytes;
        let aligned = self.address.is_multiple_of(16)
            && strides.iter().all(|stride| stride.is_multiple_of(unit));
        records::View {
            data: self.address,
            token_stride: strides[0],
            head_stride: strides[1],
            dtype: match self.dtype {
                Dtype::F32 => 0,
                Dtype::F16 => 1,
                Dtype::Bf16 => 2,
            },
            aligned: u32::from(aligned),
        }
    }

    fn check_stream(&self, what: &'static str, stream: &CudaStream) -> Result<()> {
        if self.stream.is_some_and(|own| own != stream.cu_stream() as usize) {
            let expected =
                "memory of the cache's stream (CudaCache::stream), whose work it waits for";
            let found = "a slice of another stream; allocate it there, or use `from_address`";
            return Err(Error::mismatch(what, expected, found));
        }
        Ok(())
    }
}

fn check_length(shape: ViewShape, elements: usize) -> Result<()> {
    let span = shape.span();
    if span.is_some_and(|span| span <= elements) {
        return Ok(());
    }
    let needed = span.map_or("more than memory".to_owned(), |span| format!("at least {span}"));
    Err(Error::mismatch("elements under a view", needed, elements))
}

macro_rules! view {
    ($name:ident) => {
        impl $name<'_> {
            /// A view of memory at an address that is not a [`CudaSlice`].
            ///
            /// # Safety
            /// While the view and the work that was given to the cache's stream with it live, the
            /// address is that of device memory of the cache's context that holds the whole
            /// [span](ViewShape::span) of elements, aligned to their size, and nothing else writes
            /// it; of a mutable view, nothing else reads it either.
            #[must_use]
            pub unsafe fn from_address(address: u64, dtype: Dtype, shape: ViewShape) -> Self {
                Self { place: Place { address, dtype, shape, stream: None }, life: PhantomData }
            }

            /// Axes and strides.
            #[must_use]
            pub fn shape(&self) -> ViewShape {
                self.place.shape
            }

            /// Element type.
            #[must_use]
            pub fn dtype(&self) -> Dtype {
                self.place.dtype
            }

            /// The same memory as elements of another type of the same size.
            ///
            /// # Errors
            /// [`Error::Mismatch`] for a type of another size.
            pub fn with_dtype(mut self, dtype: Dtype) -> Result<Self> {
                let (own, wanted) = (self.place.dtype.bytes(), dtype.bytes());
                if own != wanted {
                    return Err(Error::mismatch("bytes of an element", own, wanted));
                }
                self.place.dtype = dtype;
                Ok(self)
            }

            pub(crate) fn record(&self) -> records::View {
                self.place.record()
            }

            pub(crate) fn check_stream(
                &self,
                what: &'static str,
                stream: &CudaStream,
            ) -> Result<()> {
                self.place.check_stream(what, stream)
            }
        }
    };
}

/// Activations `[tokens, heads, head_dim]` in device memory, read only.
///
/// A slice must belong to the cache's stream, so that whatever is done to it there, freeing it
/// included, comes after the cache's work. Memory of other streams comes in by its address.
#[derive(Clone, Copy, Debug)]
pub struct DeviceView<'a> {
    place: Place,
    life: PhantomData<&'a ()>,
}

/// Activations in device memory, written. See [`DeviceView`].
#[derive(Debug)]
pub struct DeviceViewMut<'a> {
    place: Place,
    life: PhantomData<&'a mut ()>,
}

view!(DeviceView);
view!(DeviceViewMut);

impl<'a> DeviceView<'a> {
    /// A view of a slice.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when the slice is shorter than the shape spans.
    pub fn new<T: Element>(data: &'a CudaSlice<T>, shape: ViewShape) -> Result<Self> {
        check_length(shape, data.len())?;
        let (address, _written) = data.device_ptr(data.stream());
        let stream = Some(data.stream().cu_stream() as usize);
        let place = Place { address, dtype: T::DTYPE, shape, stream };
        Ok(Self { place, life: PhantomData })
    }
}

impl<'a> DeviceViewMut<'a> {
    /// A view of a slice.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when the slice is shorter than the shape spans.
    pub fn new<T: Element>(data: &'a mut CudaSlice<T>, shape: ViewShape) -> Result<Self> {
        check_length(shape, data.len())?;
        let stream = Arc::clone(data.stream());
        let (address, _written) = data.device_ptr_mut(&stream);
        let stream = Some(stream.cu_stream() as usize);
        let place = Place { address, dtype: T::DTYPE, shape, stream };
        Ok(Self { place, life: PhantomData })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment_is_that_of_every_row() {
        let record = |address, token_stride, dtype| {
            let shape = ViewShape { token_stride, ..ViewShape::contiguous(4, 2, 64) };
            Place { address, dtype, shape, stream: None }.record()
        };
        assert_eq!(record(4096, 128, Dtype::F16).aligned, 1);
        assert_eq!(record(4098, 128, Dtype::F16).aligned, 0);
        assert_eq!(record(4096, 132, Dtype::F16).aligned, 0);
        assert_eq!(record(4096, 132, Dtype::F32).aligned, 1);
        assert_eq!(record(4096, 128, Dtype::Bf16).dtype, 2);
    }

    #[test]
    fn a_short_slice_is_told() {
        let shape = ViewShape::contiguous(4, 2, 64);
        assert!(check_length(shape, 512).is_ok());
        assert!(matches!(check_length(shape, 511), Err(Error::Mismatch { .. })));
    }
}
