//! Would the host's firewall cut guests off? Read from nftables' JSON (libnftables-json(5)), which
//! shows the rules of iptables-nft too, or from `iptables -S` where there is no nft.
//!
//! A packet must be accepted by *every* base chain of its hook: an accept in libvirt's own table
//! does not help against a drop policy elsewhere. With libvirt's iptables backend its rules stand
//! at the top of the very chain that drops, and an accept there is final for that chain.

use serde_json::Value;

/// What filters packets on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Firewall {
    /// Base chains whose policy drops.
    pub(super) dropping: Vec<Dropping>,
    /// Whether Docker's chains are there.
    pub(super) docker: bool,
    /// Whether ufw's chains are there.
    pub(super) ufw: bool,
    /// Whether firewalld's table is there.
    pub(super) firewalld: bool,
    /// Why nothing could be seen.
    pub(super) unseen: Option<String>,
}

/// A base chain that drops what nobody accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Dropping {
    /// `forward` or `input`.
    pub(super) hook: String,
    /// Family, table and chain.
    pub(super) chain: String,
    /// Whether libvirt's rules stand in this very chain.
    pub(super) libvirt_inside: bool,
    /// Interfaces named in rules that let packets pass.
    pub(super) names: Vec<String>,
}

/// Reads `nft -j list ruleset`.
pub(super) fn of_nft(text: &str) -> Option<Firewall> {
    let ruleset: Value = serde_json::from_str(text).ok()?;
    let objects = ruleset.get("nftables")?.as_array()?;
    let of_kind = |kind: &'static str| objects.iter().filter_map(move |object| object.get(kind));
    let string = |object: &Value, key: &str| {
        object
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let chains: Vec<&Value> = of_kind("chain").collect();
    let has_chain = |prefix: &str| {
        chains
            .iter()
            .any(|chain| string(chain, "name").starts_with(prefix))
    };
    let mut firewall = Firewall {
        docker: has_chain("DOCKER"),
        ufw: has_chain("ufw-"),
        firewalld: of_kind("table").any(|table| string(table, "name") == "firewalld"),
        ..Firewall::default()
    };
    for chain in &chains {
        let hook = string(chain, "hook");
        let family = string(chain, "family");
        let matters = hook == "forward" || hook == "input";
        if !matters
            || string(chain, "policy") != "drop"
            || !["ip", "inet"].contains(&family.as_str())
        {
            continue;
        }
        let (table, name) = (string(chain, "table"), string(chain, "name"));
        let mut dropping = Dropping {
            hook,
            chain: format!("{family} {table} {name}"),
            libvirt_inside: false,
            names: Vec::new(),
        };
        for rule in of_kind("rule") {
            let same_table = string(rule, "family") == family && string(rule, "table") == table;
            if !same_table {
                continue;
            }
            let text = rule.get("expr").map(Value::to_string).unwrap_or_default();
            if string(rule, "chain") == name
                && text.contains("\"jump\"")
                && text.contains("\"LIBVIRT_")
            {
                dropping.libvirt_inside = true;
            }
            if text.contains("\"accept\"") {
                for expression in rule
                    .get("expr")
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten()
                {
                    let right = expression.get("match").and_then(|one| one.get("right"));
                    dropping
                        .names
                        .extend(right.and_then(Value::as_str).map(str::to_owned));
                }
            }
        }
        firewall.dropping.push(dropping);
    }
    Some(firewall)
}

/// Reads `iptables -S` (the filter table).
pub(super) fn of_iptables(text: &str) -> Firewall {
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let has_chain = |prefix: &str| {
        lines
            .iter()
            .any(|line| matches!(line.as_slice(), ["-N", name] if name.starts_with(prefix)))
    };
    let mut firewall = Firewall {
        docker: has_chain("DOCKER"),
        ufw: has_chain("ufw-"),
        ..Firewall::default()
    };
    for (chain, hook) in [("FORWARD", "forward"), ("INPUT", "input")] {
        let drops = lines
            .iter()
            .any(|line| matches!(line.as_slice(), ["-P", name, "DROP"] if *name == chain));
        if !drops {
            continue;
        }
        let accepts: Vec<&Vec<&str>> = lines
            .iter()
            .filter(|line| line.windows(2).any(|pair| pair == ["-j", "ACCEPT"]))
            .collect();
        firewall.dropping.push(Dropping {
            hook: hook.into(),
            chain: format!("ip filter {chain}"),
            libvirt_inside: lines.iter().any(|line| {
                matches!(line.as_slice(), ["-A", name, .., "-j", target]
                    if *name == chain && target.starts_with("LIBVIRT_"))
            }),
            names: accepts
                .iter()
                .flat_map(|line| line.windows(2))
                .filter(|pair| matches!(pair, ["-i" | "-o", _]))
                .filter_map(|pair| pair.get(1).map(|name| (*name).to_owned()))
                .collect(),
        });
    }
    firewall
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Docker set the policy of FORWARD; libvirt works with nftables, in a table of its own.
    const DOCKER_NFT: &str = r#"{"nftables": [
        {"metainfo": {"json_schema_version": 1}},
        {"table": {"family": "ip", "name": "filter", "handle": 1}},
        {"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER", "handle": 3}},
        {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 2, "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
        {"chain": {"family": "ip", "table": "filter", "name": "INPUT", "handle": 4, "type": "filter", "hook": "input", "prio": 0, "policy": "accept"}},
        {"chain": {"family": "ip", "table": "libvirt_network", "name": "forward", "handle": 5, "type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}},
        {"rule": {"family": "ip", "table": "filter", "chain": "FORWARD", "handle": 6, "expr": [{"jump": {"target": "DOCKER-USER"}}]}},
        {"rule": {"family": "ip", "table": "filter", "chain": "DOCKER-USER", "handle": 7, "expr": [{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "ghost0"}}, {"accept": null}]}}
    ]}"#;

    #[test]
    fn a_drop_policy_is_seen_with_who_made_it() {
        let firewall = of_nft(DOCKER_NFT).unwrap();
        assert!(firewall.docker && !firewall.ufw && !firewall.firewalld);
        assert_eq!(
            firewall.dropping,
            [Dropping {
                hook: "forward".into(),
                chain: "ip filter FORWARD".into(),
                libvirt_inside: false,
                names: vec!["ghost0".into()],
            }]
        );
    }

    #[test]
    fn libvirts_rules_in_the_same_chain_are_seen() {
        let text = r#"{"nftables": [
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": "drop"}},
            {"rule": {"family": "ip", "table": "filter", "chain": "FORWARD", "expr": [{"jump": {"target": "LIBVIRT_FWO"}}]}}
        ]}"#;
        let firewall = of_nft(text).unwrap();
        assert!(firewall.dropping[0].libvirt_inside);
        // The same rule in another table does not help this chain.
        let elsewhere = text.replace(
            r#""rule": {"family": "ip", "table": "filter""#,
            r#""rule": {"family": "ip", "table": "other""#,
        );
        assert!(!of_nft(&elsewhere).unwrap().dropping[0].libvirt_inside);
    }

    #[test]
    fn iptables_alone_is_read_too() {
        let text = "-P INPUT DROP\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n-N ufw-user-forward\n-N LIBVIRT_FWO\n\
                    -A INPUT -i ghost0 -p udp -j ACCEPT\n-A FORWARD -j LIBVIRT_FWO\n";
        let firewall = of_iptables(text);
        assert!(firewall.ufw && !firewall.docker);
        assert_eq!(firewall.dropping.len(), 2);
        assert!(firewall.dropping[0].libvirt_inside);
        assert!(!firewall.dropping[1].libvirt_inside);
        assert_eq!(firewall.dropping[1].names, ["ghost0"]);
        assert!(of_iptables("-P FORWARD ACCEPT\n").dropping.is_empty());
    }

    #[test]
    fn what_is_no_ruleset_is_none() {
        assert_eq!(of_nft("nonsense"), None);
        assert_eq!(of_nft("{}"), None);
        assert_eq!(of_nft(r#"{"nftables": []}"#), Some(Firewall::default()));
    }
}
