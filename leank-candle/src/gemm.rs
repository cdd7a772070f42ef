//! Safe matrix product on slices: candle's own `gemm`, without its allocation of every result.

use gemm::Parallelism;

/// A read-only matrix of f32 inside a slice: `rows` x `cols`, element (i, j) at
/// `i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(crate) struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// `rows` x `cols`, row after row.
    pub(crate) fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "{} elements for {rows} x {cols}", data.len());
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// `rows` x `cols` with `row_stride >= cols` elements from one row to the next.
    pub(crate) fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        assert!(row_stride >= cols);
        assert!(rows == 0 || data.len() >= (rows - 1) * row_stride + cols);
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose, without moving anything.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// Threads of one product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The caller's only: for products inside a parallel loop.
    One,
    /// The rayon pool.
    All,
}

/// `out = a b`, row after row; what `out` held before is ignored.
pub(crate) fn matmul(a: MatRef<'_>, b: MatRef<'_>, out: &mut [f32], threads: Threads) {
    let (m, k, n) = (a.rows, a.cols, b.cols);
    assert_eq!(k, b.rows, "inner sizes of a product");
    assert_eq!(out.len(), m * n, "size of a product");
    if out.is_empty() {
        return;
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
    };
    // SAFETY: `MatRef`'s constructors keep every element (i, j) of `a` and `b` inside their
    // slices, and `out` holds exactly m x n elements and aliases neither.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_and_transposes_are_right() {
        let a: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let b: Vec<f32> = (0..12).map(|i| (i * i) as f32 - 5.0).collect();
        for threads in [Threads::One, Threads::All] {
            let mut out = vec![f32::NAN; 8];
            matmul(MatRef::new(&a, 2, 3), MatRef::new(&b, 3, 4), &mut out, threads);
            for i in 0..2 {
                for j in 0..4 {
                    let want: f32 = (0..3).map(|c| a[i * 3 + c] * b[c * 4 + j]).sum();
                    assert_eq!(out[i * 4 + j], want);
                }
            }
            let mut out_t = vec![f32::NAN; 9];
            matmul(MatRef::new(&a, 2, 3).t(), MatRef::strided(&b, 2, 3, 4), &mut out_t, threads);
            for i in 0..3 {
                for j in 0..3 {
                    let want: f32 = (0..2).map(|c| a[c * 3 + i] * b[c * 4 + j]).sum();
                    assert_eq!(out_t[i * 3 + j], want);
                }
            }
        }
    }
}
