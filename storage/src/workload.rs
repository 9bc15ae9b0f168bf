//! Generated preference graphs of any size: the workloads W1, W2 and W3 of the benchmarks.
//!
//! Users have the same number of edges each, none twice. Attribute popularity is Zipf-like
//! (rank to the power of -0.6), and users of one cluster draw half of their edges from the
//! cluster's own pool of attributes, mostly with the cluster's sign: so there are true
//! neighbors to find. Every user is drawn from a [`Philox`] stream of their own, which makes
//! user 999,999 as cheap to get as user 0, and nothing is ever held in memory.
//!
//! ```
//! use simpatico_storage::workload::Workload;
//! let first = Workload::w1(7).events().next();
//! assert_eq!(first.map(|event| event.user), Some("user 0".to_string()));
//! ```

use simpatico_schema::random::Philox;
use simpatico_schema::{Event, Sign};

/// A generated graph: what is in it follows from these numbers alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// How many users.
    pub users: u32,
    /// How many attributes.
    pub attributes: u32,
    /// Edges of each user; at most a quarter of the attributes.
    pub edges_per_user: u32,
    /// The seed of everything.
    pub seed: u64,
}

/// Users of one cluster, on average.
const CLUSTER_USERS: u32 = 500;
/// The first event's time, in milliseconds since 1970; each edge is one millisecond later.
const START_MS: i64 = 1_700_000_000_000;

impl Workload {
    /// 3,000 users, 1,000 attributes, 48 edges a user.
    pub fn w1(seed: u64) -> Self {
        Self::new(3_000, 1_000, 48, seed)
    }

    /// 100,000 users, 5,000 attributes, 50 edges a user.
    pub fn w2(seed: u64) -> Self {
        Self::new(100_000, 5_000, 50, seed)
    }

    /// 1,000,000 users, 20,000 attributes, 50 edges a user.
    pub fn w3(seed: u64) -> Self {
        Self::new(1_000_000, 20_000, 50, seed)
    }

    /// Any size. Edges per user are cut to a quarter of the attributes.
    pub fn new(users: u32, attributes: u32, edges_per_user: u32, seed: u64) -> Self {
        Self {
            users,
            attributes,
            edges_per_user: edges_per_user.min(attributes / 4),
            seed,
        }
    }

    /// How many edges there are.
    pub fn edge_count(&self) -> u64 {
        u64::from(self.users) * u64::from(self.edges_per_user)
    }

    /// The name of a user number.
    pub fn user_name(&self, user: u32) -> String {
        format!("user {user}")
    }

    /// The name of an attribute number.
    pub fn attribute_name(&self, attribute: u32) -> String {
        format!("attribute {attribute}")
    }

    /// The edges of one user, in the order they were said. `edges` is cleared first.
    pub fn user_edges(&self, user: u32, edges: &mut Vec<(u32, Sign)>) {
        let mut random = Philox::new(self.seed, u64::from(user));
        let cluster = random.below((self.users / CLUSTER_USERS).max(4));
        edges.clear();
        while edges.len() < self.edges_per_user as usize {
            let (attribute, sign) = self.draw(cluster, &mut random);
            if edges.iter().all(|edge| edge.0 != attribute) {
                edges.push((attribute, sign));
            }
        }
    }

    fn draw(&self, cluster: u32, random: &mut Philox) -> (u32, Sign) {
        let of_cluster = random.below(2) == 0;
        let x = random.uniform_f64();
        let rank = if of_cluster {
            // One of the cluster's pool; which attributes those are is a hash's business.
            let pool = (self.attributes / 16).max(self.edges_per_user * 2);
            let item = (x * f64::from(pool)) as u32;
            let spread = f64::from(mix(cluster, item)) / f64::from(u32::MAX);
            self.rank(spread * spread.sqrt())
        } else {
            // P(rank <= r) = (r / n)^0.4: the density falls as rank^-0.6.
            self.rank(x * x * x.sqrt())
        };
        // Popularity must not follow the numbers; a prime step scatters the ranks.
        let attribute = u64::from(rank) * 2_654_435_761 % u64::from(self.attributes);
        let attribute = attribute as u32;
        let likes = match of_cluster {
            true => !mix(attribute, cluster).is_multiple_of(3) ^ (random.below(10) == 0),
            false => random.below(10) < 7,
        };
        (attribute, if likes { Sign::Like } else { Sign::Dislike })
    }

    fn rank(&self, x: f64) -> u32 {
        ((x * f64::from(self.attributes)) as u32).min(self.attributes - 1)
    }

    /// All edges as (user, attribute, sign, `at`), user after user.
    pub fn edges(&self) -> impl Iterator<Item = (u32, u32, Sign, i64)> {
        let this = *self;
        (0..this.users).flat_map(move |user| {
            let mut edges = Vec::new();
            this.user_edges(user, &mut edges);
            let first = START_MS + i64::from(user) * i64::from(this.edges_per_user);
            let timed = edges.into_iter().zip(first..);
            timed.map(move |((attribute, sign), at)| (user, attribute, sign, at))
        })
    }

    /// All edges, those of each `window` successive users in random order: events as they
    /// come from many users at once.
    pub fn shuffled_edges(&self, window: u32) -> impl Iterator<Item = (u32, u32, Sign, i64)> {
        let this = *self;
        let window = window.max(1);
        (0..this.users.div_ceil(window)).flat_map(move |number| {
            let from = number * window;
            let part = Self {
                users: this.users.min(from + window) - from,
                ..this
            };
            let mut all = Vec::with_capacity(part.edge_count() as usize);
            let mut edges = Vec::new();
            for user in from..from + part.users {
                this.user_edges(user, &mut edges);
                all.extend(
                    edges
                        .iter()
                        .map(|&(attribute, sign)| (user, attribute, sign)),
                );
            }
            Philox::new(this.seed, u64::from(number) | 1 << 63).shuffle(&mut all);
            let first = START_MS + i64::from(from) * i64::from(this.edges_per_user);
            let timed = all.into_iter().zip(first..);
            timed.map(|((user, attribute, sign), at)| (user, attribute, sign, at))
        })
    }

    /// [`Self::edges`] as events.
    pub fn events(&self) -> impl Iterator<Item = Event> {
        let this = *self;
        self.edges().map(move |(user, attribute, sign, at)| {
            let (user, attribute) = (this.user_name(user), this.attribute_name(attribute));
            Event::new(&user, &attribute, sign.polarity()).at(at)
        })
    }
}

/// A hash of two numbers (the finalizer of MurmurHash3).
fn mix(a: u32, b: u32) -> u32 {
    let mut h = a.wrapping_mul(0x9E37_79B1) ^ b.wrapping_mul(0x85EB_CA77);
    h = (h ^ h >> 16).wrapping_mul(0x85EB_CA6B);
    h = (h ^ h >> 13).wrapping_mul(0xC2B2_AE35);
    h ^ h >> 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_has_its_edges_none_twice_and_the_same_every_time() {
        let workload = Workload::new(2_000, 300, 40, 5);
        let plain: Vec<_> = workload.edges().map(|e| (e.0, e.1, e.2)).collect();
        let mut shuffled: Vec<_> = workload
            .shuffled_edges(300)
            .map(|e| (e.0, e.1, e.2))
            .collect();
        assert_ne!(plain, shuffled);
        let mut sorted = plain.clone();
        sorted.sort();
        shuffled.sort();
        assert_eq!(sorted, shuffled);
        sorted.dedup_by_key(|e| (e.0, e.1));
        assert_eq!(sorted.len() as u64, workload.edge_count());
    }

    #[test]
    fn popularity_is_skewed_about_as_much_as_the_published_workloads() {
        let workload = Workload::w1(0);
        let mut degrees = vec![0_u64; 1_000];
        workload.edges().for_each(|e| degrees[e.1 as usize] += 1);
        // How many edges the postings of an average user hold, against an even spread.
        let squares: u64 = degrees.iter().map(|d| d * d).sum();
        let edges = workload.edge_count();
        let skew = squares as f64 * 1_000.0 / (edges * edges) as f64;
        assert!((1.7..3.5).contains(&skew), "{skew}");
    }
}
