//! Prefix sharing: many users ask about the same long document. It is read once, every user's sequence is a fork of
//! it, and its blocks are held once, however many there are.
//!
//!     cargo run --release -p leank --example shared_prefix
//!
//! The document's part of the cache is written to a file too: the next process restores it in place of reading
//! the document again.

use leank::{Backend, Cache};

use self::toy::{HostCache, Job, Random, Result, Toy, Work, config, on_the_best_backend};

#[path = "toy/mod.rs"]
mod toy;

const USERS: usize = 16;
const ANSWER: usize = 24;

struct Ask {
    document: Vec<u32>,
    questions: Vec<Vec<u32>>,
}

impl Ask {
    /// Answers of all users, who are forks of a sequence that has read the document.
    fn answer<C: HostCache>(
        &self,
        toy: &Toy,
        cache: &mut C,
        document: leank::SequenceId,
    ) -> Result<Vec<Vec<u32>>> {
        let forks = self.questions.iter().map(|_| cache.fork(document));
        let forks = forks.collect::<leank::Result<Vec<_>>>()?;
        let mut next: Vec<Vec<u32>> = self.questions.clone();
        let mut answers = vec![Vec::new(); forks.len()];
        for _ in 0..ANSWER {
            let work: Vec<_> = forks
                .iter()
                .zip(&next)
                .map(|(&sequence, tokens)| Work { sequence, tokens })
                .collect();
            let said = toy.step(cache, &work)?;
            let mut row = 0;
            for (own, answer) in next.iter_mut().zip(&mut answers) {
                row += own.len();
                answer.push(said[row - 1]);
                *own = vec![said[row - 1]];
            }
        }
        let memory = cache.memory();
        let alone =
            backend_bytes(cache, self.document.len() + self.questions[0].len() + ANSWER - 1)?;
        println!(
            "{USERS} users of a document of {} tokens: {} KiB, where {USERS} caches of their own take {} KiB",
            self.document.len(),
            memory.used_bytes() >> 10,
            (alone * USERS as u64) >> 10
        );
        for fork in forks {
            cache.release(fork)?;
        }
        Ok(answers)
    }
}

/// Bytes of one sequence of its own.
fn backend_bytes<C: Cache>(cache: &C, tokens: usize) -> Result<u64> {
    let (layout, windows) = (cache.layout(), cache.config().windows);
    Ok(leank::BlockCount::at(tokens, layout.block, windows).bytes(layout))
}

impl Job for Ask {
    fn run<B: Backend<Cache: HostCache>>(self, backend: &B) -> Result<()> {
        println!("{}", backend.name());
        let toy = Toy::new();
        let mut cache = backend.create(config(None)?)?;
        let document = cache.add_sequence();
        for chunk in self.document.chunks(64) {
            toy.step(&mut cache, &[Work { sequence: document, tokens: chunk }])?;
        }
        let answers = self.answer(&toy, &mut cache, document)?;

        let mut saved = Vec::new();
        cache.save(document, &mut saved)?;
        drop(cache);
        let mut cache = backend.create(config(None)?)?;
        let document = cache.restore(&mut &saved[..])?;
        println!("the document is {} KiB on disk", saved.len() >> 10);
        assert_eq!(
            self.answer(&toy, &mut cache, document)?,
            answers,
            "another process answers otherwise"
        );
        Ok(())
    }
}

pub(crate) fn main() -> Result<()> {
    let mut random = Random(11);
    let document = random.tokens(1500);
    let questions = (0..USERS).map(|_| random.tokens(9)).collect();
    on_the_best_backend(Ask { document, questions })
}
