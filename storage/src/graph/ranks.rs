//! Users' places in the order of their names, for questions on which very many users tie.
//!
//! A name costs several cache misses, a rank one integer of an array that is read in order. Ranks
//! are made on a thread of their own when they are first missed, again after the users have
//! grown by a third, and never waited for: without them, and for users who came since, names
//! are compared.

use super::names::Names;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What all snapshots of one history share.
#[derive(Debug, Default)]
pub(crate) struct Ranks {
    /// The history's newest number of users. Another clone that adds users starts its own.
    newest: AtomicU32,
    made: Mutex<Made>,
}

#[derive(Debug, Default)]
struct Made {
    /// By user number. A number's name never changes, so that they hold in every snapshot.
    ranks: Option<Arc<Vec<u32>>>,
    at_work: bool,
}

/// Moves a history on after a user was added; a graph that is not at its end gets its own.
pub(crate) fn next_end(ranks: &mut Arc<Ranks>, old: u32, new: u32) {
    let order = Ordering::Relaxed;
    let moved = ranks.newest.compare_exchange(old, new, order, order);
    if moved.is_err() {
        *ranks = Arc::default();
        ranks.newest.store(new, order);
    }
}

/// The ranks of the first users, as far as they are made; has more made if those are few.
pub(crate) fn get(ranks: &Arc<Ranks>, names: &Names) -> Option<Arc<Vec<u32>>> {
    let mut made = ranks.made.lock().unwrap_or_else(PoisonError::into_inner);
    let known = made.ranks.as_ref().map_or(0, |ranks| ranks.len());
    if !made.at_work && known < names.end() as usize / 4 * 3 {
        let (names, ranks) = (names.clone(), ranks.clone());
        let thread = std::thread::Builder::new().name("simpatico-ranks".into());
        let started = thread.spawn(move || {
            let fresh = Arc::new(make(&names));
            let mut made = ranks.made.lock().unwrap_or_else(PoisonError::into_inner);
            (made.ranks, made.at_work) = (Some(fresh), false);
        });
        made.at_work = started.is_ok();
    }
    made.ranks.clone()
}

/// O(n log n).
pub(crate) fn make(names: &Names) -> Vec<u32> {
    let mut order: Vec<(&[u8], u32)> = (0..names.end()).map(|u| (names.bytes(u), u)).collect();
    order.sort_unstable();
    let mut ranks = vec![0; order.len()];
    for (rank, (_, user)) in (0u32..).zip(order) {
        ranks[user as usize] = rank;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::super::Graph;
    use std::sync::Arc;

    #[test]
    fn who_goes_on_first_keeps_the_ranks_and_another_history_gets_its_own() {
        let mut graph = Graph::new();
        graph.add_user("a");
        let (first, mut other) = (graph.ranks.clone(), graph.clone());
        for name in ["b", "c", "d"] {
            graph.add_user(name);
            assert!(Arc::ptr_eq(&first, &graph.ranks), "{name}");
        }
        other.add_user("e");
        let second = other.ranks.clone();
        assert!(!Arc::ptr_eq(&first, &second));
        other.add_user("f");
        assert!(Arc::ptr_eq(&second, &other.ranks));
    }

    /// Asks until the ranks of so many users are made, and returns them.
    fn wait(graph: &Graph, len: usize) -> Vec<u32> {
        loop {
            match super::get(&graph.ranks, &graph.users) {
                Some(ranks) if ranks.len() == len => return ranks.to_vec(),
                _ => std::thread::yield_now(),
            }
        }
    }

    fn at_work(graph: &Graph) -> bool {
        graph.ranks.made.lock().unwrap().at_work
    }

    #[test]
    fn ranks_are_places_by_name_and_made_again_when_users_have_grown_by_a_third() {
        let mut graph = Graph::new();
        for name in ["i", "b", "h", "a", "g", "c", "f", "d", "e"] {
            graph.add_user(name);
        }
        assert_eq!(super::get(&graph.ranks, &graph.users), None);
        assert_eq!(wait(&graph, 9), [8, 1, 7, 0, 6, 2, 5, 3, 4]);
        for n in 0..3 {
            graph.add_user(&format!("x{n}"));
        }
        // Nine of twelve are three quarters, which will do.
        let of_nine = super::get(&graph.ranks, &graph.users).map(|ranks| ranks.len());
        assert_eq!((of_nine, at_work(&graph)), (Some(9), false));
        for n in 0..4 {
            graph.add_user(&format!("w{n}"));
        }
        assert_eq!(wait(&graph, 16)[12..], [9, 10, 11, 12]);
    }
}
