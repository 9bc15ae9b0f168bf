//! A persistent radix tree: a growing array whose clones are free and see one moment.
//!
//! Every node sits behind an `Arc`. A write goes down one path; nodes nobody else holds are
//! changed in place, nodes a clone still holds are copied first (a few hundred bytes each).
//! So a snapshot costs nothing when it is taken, and each later write at most one path.

use std::sync::Arc;

const FAN_BITS: u32 = 5;
const FAN: usize = 1 << FAN_BITS;

/// An array of `T` by index, in leaves of `L`; places never written hold the default.
#[derive(Debug)]
pub(crate) struct Tree<T, const L: usize> {
    root: Option<Node<T, L>>,
    /// Levels of branches above the leaves.
    height: u32,
}

#[derive(Debug)]
enum Node<T, const L: usize> {
    Branch(Arc<Children<T, L>>),
    Leaf(Arc<[T; L]>),
}

type Children<T, const L: usize> = [Option<Node<T, L>>; FAN];

impl<T, const L: usize> Clone for Node<T, L> {
    fn clone(&self) -> Self {
        match self {
            Self::Branch(children) => Self::Branch(children.clone()),
            Self::Leaf(items) => Self::Leaf(items.clone()),
        }
    }
}

impl<T, const L: usize> Node<T, L> {
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Branch(a), Self::Branch(b)) => Arc::ptr_eq(a, b),
            (Self::Leaf(a), Self::Leaf(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl<T, const L: usize> Clone for Tree<T, L> {
    fn clone(&self) -> Self {
        Self {
            root: self.root.clone(),
            height: self.height,
        }
    }
}

impl<T, const L: usize> Default for Tree<T, L> {
    fn default() -> Self {
        Self {
            root: None,
            height: 0,
        }
    }
}

impl<T, const L: usize> Tree<T, L> {
    /// The item at `index`; `None` where no item of its leaf was ever written.
    pub fn get(&self, index: usize) -> Option<&T> {
        let slot = index / L;
        if slot >> (self.height * FAN_BITS) != 0 {
            return None;
        }
        let mut level = self.height;
        let mut node = self.root.as_ref()?;
        loop {
            match node {
                Node::Leaf(items) => return Some(&items[index % L]),
                Node::Branch(children) => {
                    level = level.wrapping_sub(1);
                    node = children[(slot >> (level * FAN_BITS)) % FAN].as_ref()?;
                }
            }
        }
    }

    /// Calls `differ(index, mine, theirs)` for the items of every leaf that the two trees do
    /// not hold in common. Costs as much as was written since one was cloned of the other.
    pub fn for_each_difference(
        &self,
        other: &Self,
        differ: &mut impl FnMut(usize, Option<&T>, Option<&T>),
    ) {
        let height = self.height.max(other.height);
        let mine = (self.root.as_ref(), self.height);
        let theirs = (other.root.as_ref(), other.height);
        walk_differences(mine, theirs, height, 0, differ);
    }
}

/// A node, if there is one, and its level; one lower than asked for stands at child 0.
type At<'a, T, const L: usize> = (Option<&'a Node<T, L>>, u32);

fn walk_differences<T, const L: usize>(
    mine: At<'_, T, L>,
    theirs: At<'_, T, L>,
    level: u32,
    slot: usize,
    differ: &mut impl FnMut(usize, Option<&T>, Option<&T>),
) {
    match (mine.0, theirs.0) {
        (None, None) => return,
        (Some(a), Some(b)) if a.is_same(b) => return,
        _ => {}
    }
    if level == 0 {
        for i in 0..L {
            differ(slot * L + i, leaf_item(mine.0, i), leaf_item(theirs.0, i));
        }
        return;
    }
    for i in 0..FAN {
        let (a, b) = (child(mine, level, i), child(theirs, level, i));
        walk_differences(a, b, level - 1, slot * FAN + i, differ);
    }
}

fn child<T, const L: usize>(at: At<'_, T, L>, level: u32, i: usize) -> At<'_, T, L> {
    match at {
        (node, height) if height < level => (node.filter(|_| i == 0), height),
        (Some(Node::Branch(children)), _) => (children[i].as_ref(), level - 1),
        _ => (None, level - 1),
    }
}

fn leaf_item<T, const L: usize>(node: Option<&Node<T, L>>, i: usize) -> Option<&T> {
    match node {
        Some(Node::Leaf(items)) => Some(&items[i]),
        _ => None,
    }
}

impl<T: Clone + Default, const L: usize> Tree<T, L> {
    /// The item at `index`, to be written; what a clone shares is copied first.
    pub fn get_mut(&mut self, index: usize) -> &mut T {
        let slot = index / L;
        while slot >> (self.height * FAN_BITS) != 0 {
            if let Some(root) = self.root.take() {
                let mut children: Children<T, L> = std::array::from_fn(|_| None);
                children[0] = Some(root);
                self.root = Some(Node::Branch(Arc::new(children)));
            }
            self.height += 1;
        }
        let mut level = self.height;
        let mut place = &mut self.root;
        loop {
            let node = place.get_or_insert_with(|| match level {
                0 => Node::Leaf(Arc::new(std::array::from_fn(|_| T::default()))),
                _ => Node::Branch(Arc::new(std::array::from_fn(|_| None))),
            });
            match node {
                Node::Leaf(items) => return &mut Arc::make_mut(items)[index % L],
                Node::Branch(children) => {
                    level = level.wrapping_sub(1);
                    let i = (slot >> (level * FAN_BITS)) % FAN;
                    place = &mut Arc::make_mut(children)[i];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use simpatico_schema::random::Philox;

    #[test]
    fn clones_keep_their_moment_and_differences_are_found() {
        let mut random = Philox::new(3, 0);
        let mut tree = Tree::<u32, 4>::default();
        let mut plain = vec![0; 70_000];
        for round in 0..40 {
            let (then, plain_then) = (tree.clone(), plain.clone());
            for _ in 0..50 {
                let index = random.below([10, 500, 70_000][round % 3]) as usize;
                let value = random.next_u32();
                *tree.get_mut(index) = value;
                plain[index] = value;
            }
            let mut rebuilt = plain_then.clone();
            tree.for_each_difference(&then, &mut |i, now, before| {
                assert_eq!(before.copied().unwrap_or(0), plain_then[i]);
                rebuilt[i] = now.copied().unwrap_or(0);
            });
            assert!(rebuilt == plain, "round {round}");
            for i in 0..plain.len() {
                assert_eq!(tree.get(i).copied().unwrap_or(0), plain[i]);
                assert_eq!(then.get(i).copied().unwrap_or(0), plain_then[i]);
            }
        }
    }

    #[test]
    fn what_two_trees_share_is_not_looked_through() {
        let mut tree = Tree::<u32, 4>::default();
        for index in 0..5_000 {
            *tree.get_mut(index) = 1;
        }
        let then = tree.clone();
        let looked = |now: &Tree<u32, 4>| {
            let mut looked = 0;
            now.for_each_difference(&then, &mut |_, _, _| looked += 1);
            looked
        };
        assert_eq!(looked(&tree), 0);
        // One leaf of four.
        *tree.get_mut(4_321) = 2;
        assert_eq!(looked(&tree), 4);
    }
}
