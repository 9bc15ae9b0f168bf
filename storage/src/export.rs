//! A snapshot as files that other programs read, and as a `petgraph` graph.
//!
//! ```
//! # use simpatico_schema::{Event, Polarity};
//! # use simpatico_storage::{Node, Options, Store, communities};
//! # use petgraph::algo::connected_components;
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let store = Store::open(dir.path(), Options::default())?;
//! # store.append(&[
//! #     Event::new("ada", "wood", Polarity::Like),
//! #     Event::new("ben", "wood", Polarity::Like),
//! #     Event::new("cyd", "neon", Polarity::Like),
//! # ])?;
//! let graph = store.snapshot().to_petgraph();
//! assert_eq!(connected_components(&graph), 2);
//! let community = communities(&graph, 10);
//! let of = |name: &str| graph.node_indices().find(|n| graph[*n] == Node::User(name.into()));
//! let number = |name: &str| of(name).map(|n| community[n.index()]);
//! assert_eq!(number("ada"), number("ben"));
//! assert_ne!(number("ada"), number("cyd"));
//! # Ok(()) }
//! ```

use crate::graph::{AttributeId, UserId};
use crate::snapshot::Snapshot;
use petgraph::graph::{NodeIndex, UnGraph};
use simpatico_schema::Sign;
use std::collections::BTreeMap;
use std::io::{self, Write};

/// A node of an exported graph.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    /// A user, by name.
    User(String),
    /// An attribute, by name.
    Attribute(String),
}

impl Snapshot {
    /// All registers as JSON lines that `ingest` reads again, clears and passes included.
    /// Returns how many.
    pub fn export_jsonl(&self, out: &mut impl Write) -> io::Result<u64> {
        let mut lines = 0;
        for user in self.state.users() {
            for event in self.registers_of(user) {
                serde_json::to_writer(&mut *out, &event)?;
                out.write_all(b"\n")?;
                lines += 1;
            }
        }
        out.flush()?;
        Ok(lines)
    }

    fn for_each_edge(
        &self,
        mut each: impl FnMut(UserId, AttributeId, Sign) -> io::Result<()>,
    ) -> io::Result<u64> {
        let mut edges = 0;
        for user in self.state.users() {
            for (attribute, sign) in self.state.graph.edges(user) {
                each(user, attribute, sign)?;
                edges += 1;
            }
        }
        Ok(edges)
    }

    /// Users, attributes and edges as GraphML. Returns how many edges.
    pub fn export_graphml(&self, out: &mut impl Write) -> io::Result<u64> {
        let graph = &self.state.graph;
        writeln!(out, r#"<?xml version="1.0" encoding="UTF-8"?>"#)?;
        writeln!(
            out,
            r#"<graphml xmlns="http://graphml.graphdrawing.org/xmlns">"#
        )?;
        for (id, of) in [("kind", "node"), ("name", "node"), ("sign", "edge")] {
            writeln!(
                out,
                r#"  <key id="{id}" for="{of}" attr.name="{id}" attr.type="string"/>"#
            )?;
        }
        writeln!(out, r#"  <graph edgedefault="undirected">"#)?;
        let node = |out: &mut dyn Write, id: String, kind: &str, name: &str| {
            let name = escape_xml(name);
            writeln!(
                out,
                r#"    <node id="{id}"><data key="kind">{kind}</data><data key="name">{name}</data></node>"#
            )
        };
        for user in self.state.users() {
            node(out, format!("u{}", user.0), "user", graph.user_name(user))?;
        }
        for a in 0..graph.attribute_count() as u32 {
            let name = graph.attribute_name(AttributeId(a));
            node(out, format!("a{a}"), "attribute", name)?;
        }
        let edges = self.for_each_edge(|user, attribute, sign| {
            writeln!(
                out,
                r#"    <edge source="u{}" target="a{}"><data key="sign">{}</data></edge>"#,
                user.0,
                attribute.0,
                sign.polarity().as_str()
            )
        })?;
        writeln!(out, "  </graph>\n</graphml>")?;
        out.flush()?;
        Ok(edges)
    }

    /// Users (circles), attributes (boxes) and edges as Graphviz DOT; dislikes are dashed.
    /// Returns how many edges.
    pub fn export_dot(&self, out: &mut impl Write) -> io::Result<u64> {
        let graph = &self.state.graph;
        writeln!(out, "graph preferences {{")?;
        for user in self.state.users() {
            let name = escape_dot(graph.user_name(user));
            writeln!(out, "  u{} [label=\"{name}\"];", user.0)?;
        }
        for a in 0..graph.attribute_count() as u32 {
            let name = escape_dot(graph.attribute_name(AttributeId(a)));
            writeln!(out, "  a{a} [shape=box, label=\"{name}\"];")?;
        }
        let edges = self.for_each_edge(|user, attribute, sign| {
            let style = match sign {
                Sign::Like => "",
                Sign::Dislike => " [style=dashed]",
            };
            writeln!(out, "  u{} -- a{}{style};", user.0, attribute.0)
        })?;
        writeln!(out, "}}")?;
        out.flush()?;
        Ok(edges)
    }

    /// The graph for `petgraph`'s algorithms: users first, then attributes, each by number.
    pub fn to_petgraph(&self) -> UnGraph<Node, Sign> {
        let graph = &self.state.graph;
        let mut out = UnGraph::with_capacity(
            graph.user_count() + graph.attribute_count(),
            graph.edge_count() as usize,
        );
        let mut users: BTreeMap<u32, NodeIndex> = BTreeMap::new();
        for user in self.state.users() {
            let node = Node::User(graph.user_name(user).into());
            users.insert(user.0, out.add_node(node));
        }
        let attributes: Vec<NodeIndex> = (0..graph.attribute_count() as u32)
            .map(|a| Node::Attribute(graph.attribute_name(AttributeId(a)).into()))
            .map(|node| out.add_node(node))
            .collect();
        for user in self.state.users() {
            for (attribute, sign) in graph.edges(user) {
                out.add_edge(users[&user.0], attributes[attribute.0 as usize], sign);
            }
        }
        out
    }
}

/// Communities by label propagation (Raghavan, Albert and Kumara, 2007), made deterministic:
/// in each round every node, in order, takes the label most of its neighbors have, the
/// smallest of equals; likes count 1 and dislikes nothing. Ends when nothing changes, or
/// after `rounds_max`. Returns each node's label by its index: 0, 1, 2 … by first appearance.
pub fn communities(graph: &UnGraph<Node, Sign>, rounds_max: usize) -> Vec<usize> {
    let mut labels: Vec<usize> = (0..graph.node_count()).collect();
    for _ in 0..rounds_max {
        let mut changed = false;
        for node in graph.node_indices() {
            let mut votes: BTreeMap<usize, usize> = BTreeMap::new();
            let mut edges = graph.neighbors(node).detach();
            while let Some((edge, other)) = edges.next(graph) {
                if graph[edge] == Sign::Like {
                    *votes.entry(labels[other.index()]).or_default() += 1;
                }
            }
            let best = votes
                .iter()
                .max_by_key(|(label, n)| (**n, std::cmp::Reverse(**label)));
            if let Some((label, _)) = best
                && labels[node.index()] != *label
            {
                labels[node.index()] = *label;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    let mut numbers = BTreeMap::new();
    labels
        .into_iter()
        .map(|label| {
            let next = numbers.len();
            *numbers.entry(label).or_insert(next)
        })
        .collect()
}

fn escape_xml(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            // Names may hold two characters that XML forbids even as references.
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

fn escape_dot(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"")
}
