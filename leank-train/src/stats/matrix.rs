//! Matrix products on slices.

use ndarray::{ArrayView2, ArrayViewMut2, linalg::general_mat_mul};

/// `values` with `len` elements, all 0.
pub(super) fn reset(values: &mut Vec<f32>, len: usize) {
    values.clear();
    values.resize(len, 0.0);
}

/// `values` with `len` elements that are about to be overwritten.
pub(super) fn size(values: &mut Vec<f32>, len: usize) {
    values.resize(len, 0.0);
}

/// The first `rows · columns` values as a matrix.
pub(super) fn view(values: &[f32], rows: usize, columns: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((rows, columns), &values[..rows * columns])
        .expect("the slice was cut to the shape")
}

/// `out = a · b + beta · out`, row-major.
pub(super) fn multiply(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, beta: f32, out: &mut [f32]) {
    let shape = (a.nrows(), b.ncols());
    let len = shape.0 * shape.1;
    let mut out =
        ArrayViewMut2::from_shape(shape, &mut out[..len]).expect("the slice was cut to the shape");
    general_mat_mul(1.0, &a, &b, beta, &mut out);
}
