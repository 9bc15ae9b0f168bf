//! Names and their numbers, persistent: a snapshot knows exactly the names of its moment.
//!
//! Numbers are dense and never given twice. From name to number leads a linear hash table:
//! it grows by one bucket at a time, so that no insertion ever rehashes everything, and its
//! buckets sit in a persistent tree. The hash is seeded per table, so that nobody can
//! prepare names that meet in one bucket.

use super::pack::Packs;
use super::tree::Tree;
use std::hash::BuildHasher;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Names per bucket, on average, before one more bucket is added.
const LOAD: u32 = 6;

#[derive(Clone, Debug)]
pub(crate) struct Names {
    names: Packs,
    end: u32,
    live: u32,
    seed: u64,
    /// An entry is the hash in the upper and the number in the lower half.
    buckets: Tree<Vec<u64>, 8>,
    bucket_count: u32,
}

impl Default for Names {
    fn default() -> Self {
        Self {
            names: Packs::default(),
            end: 0,
            live: 0,
            seed: std::hash::RandomState::new().hash_one(0_u8),
            buckets: Tree::default(),
            bucket_count: 1,
        }
    }
}

impl Names {
    /// One more than the greatest number ever given.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// How many names there are now.
    pub fn live(&self) -> u32 {
        self.live
    }

    /// The name with this number; "" if it was never given or forgotten.
    pub fn name(&self, number: u32) -> &str {
        std::str::from_utf8(self.bytes(number)).unwrap_or("")
    }

    /// The bytes of [`Self::name`].
    pub fn bytes(&self, number: u32) -> &[u8] {
        self.names.get(number as usize)
    }

    /// The number of this name.
    pub fn find(&self, name: &str) -> Option<u32> {
        self.find_hashed(name, self.hash(name))
    }

    /// The number of this name, which gets the next one if it has none, and whether it is new.
    pub fn find_or_add(&mut self, name: &str) -> (u32, bool) {
        let hash = self.hash(name);
        if let Some(number) = self.find_hashed(name, hash) {
            return (number, false);
        }
        let number = self.end;
        self.end += 1;
        self.live += 1;
        self.names.put(number as usize, name.as_bytes());
        let bucket = self.bucket(hash);
        self.buckets
            .get_mut(bucket)
            .push(u64::from(hash) << 32 | u64::from(number));
        if self.live / LOAD > self.bucket_count {
            self.split_a_bucket();
        }
        (number, true)
    }

    /// Frees the name of this number. The number stays taken.
    pub fn forget(&mut self, number: u32) {
        let hash = self.hash(self.name(number));
        let bucket = self.bucket(hash);
        let entries = self.buckets.get_mut(bucket);
        let Some(at) = entries.iter().position(|e| *e as u32 == number) else {
            return;
        };
        entries.swap_remove(at);
        self.names.put(number as usize, &[]);
        self.live -= 1;
    }

    fn hash(&self, name: &str) -> u32 {
        xxh3_64_with_seed(name.as_bytes(), self.seed) as u32
    }

    fn bucket(&self, hash: u32) -> usize {
        let half = 1_u32 << self.bucket_count.ilog2();
        let wide = hash & (half * 2 - 1);
        let bucket = if wide < self.bucket_count {
            wide
        } else {
            hash & (half - 1)
        };
        bucket as usize
    }

    fn find_hashed(&self, name: &str, hash: u32) -> Option<u32> {
        let entries = self.buckets.get(self.bucket(hash))?;
        let same_hash = entries.iter().filter(|e| (**e >> 32) as u32 == hash);
        same_hash
            .map(|e| *e as u32)
            .find(|&number| self.bytes(number) == name.as_bytes())
    }

    /// Adds one bucket and moves there what belongs there of the bucket it is split from.
    fn split_a_bucket(&mut self) {
        let new = self.bucket_count as usize;
        let old = new - (1 << self.bucket_count.ilog2());
        self.bucket_count += 1;
        let entries = std::mem::take(self.buckets.get_mut(old));
        let stays = |e: &u64| self.bucket((*e >> 32) as u32) == old;
        let (stay, go): (Vec<_>, Vec<_>) = entries.into_iter().partition(stays);
        *self.buckets.get_mut(old) = stay;
        *self.buckets.get_mut(new) = go;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_every_snapshot_that_has_them_and_no_other() {
        let mut names = Names::default();
        let mut snapshots = Vec::new();
        for i in 0..3_000 {
            assert_eq!(names.find_or_add(&format!("n{i}")), (i, true));
            assert_eq!(names.find_or_add(&format!("n{}", i / 2)), (i / 2, false));
            if i % 500 == 0 {
                snapshots.push((i, names.clone()));
            }
        }
        // Buckets grow with the names and share them out.
        assert_eq!(names.bucket_count, 3_000 / LOAD);
        for bucket in 0..names.bucket_count as usize {
            assert!(
                names.buckets.get(bucket).is_none_or(|b| b.len() < 60),
                "{bucket}"
            );
        }
        names.forget(7);
        assert_eq!((names.find("n7"), names.name(7)), (None, ""));
        assert_eq!(names.find_or_add("n7"), (3_000, true));
        for (last, snapshot) in snapshots {
            for i in (0..3_000).step_by(7) {
                let expected = Some(i).filter(|&i| i <= last);
                assert_eq!(snapshot.find(&format!("n{i}")), expected);
            }
        }
    }
}
