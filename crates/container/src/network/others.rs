//! Other firewalls of the host: Docker's, ufw's, firewalld's, an administrator's own.
//!
//! A packet must be let through by every table of the host, so that accepting it in ours is not enough where
//! another one drops what it does not know. What containers need is therefore let in there, too, in the way that
//! the other tool means others to do it, and no wider than ours lets it through:
//!
//! - iptables, in either form (Docker, ufw, rules by hand): rules with a comment at the head of `DOCKER-USER` where
//!   Docker has made it, else of `FORWARD`, and at the head of `INPUT`;
//! - firewalld: the bridge is bound to the zone `trusted`, as long as nobody has bound it to another one;
//! - any other table that drops by default is left alone, and the log and `ionian doctor` say what it needs.
//!
//! Rules vanish when the other tool reloads. They are looked for now and then ([`super::guard`]), and removed with
//! the network. Nothing here fails a start: a host whose firewall we do not understand may well let packets pass.

use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;

use serde::Deserialize;

use super::firewall::OpenPorts;
use crate::command::{self, CommandError, Input};
use crate::runc::find_program;

/// Seconds that iptables waits for another program's lock.
const LOCK_SECONDS: &str = "5";
const DOCKER_USER: &str = "DOCKER-USER";
const FIREWALLD: &str = "firewalld";
const ZONE: &str = "trusted";
/// Every rule of ours has a comment that begins so.
const COMMENT: &str = "ionian-";

/// What is to be let in.
#[derive(Debug, Clone)]
pub(super) struct Needs {
    pub bridge: String,
    pub gateway: Ipv4Addr,
    pub ports: OpenPorts,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Found {
    /// Other firewalls that let our packets through, as they are or by rules of ours.
    pub open: BTreeSet<String>,
    /// What is in the way, and what to do.
    pub problems: BTreeSet<String>,
}

/// Lets containers' packets through the other firewalls.
pub(super) async fn admit(needs: &Needs) -> Found {
    let mut found = Found::default();
    let chains = base_chains(&mut found).await;
    for program in iptables_programs(&chains, &mut found) {
        let note = match admit_by_iptables(&program, needs).await {
            Ok(Some(chain)) => Ok(format!("{program} ({chain})")),
            Ok(None) => continue,
            Err(error) => Err(format!(
                "{program} could not be told to let containers through: {}",
                crate::chain(&error)
            )),
        };
        found.note(note);
    }
    if chains.iter().any(|chain| chain.table == FIREWALLD) {
        let note = match admit_by_firewalld(&needs.bridge).await {
            Ok(zone) => Ok(format!("firewalld (zone {zone})")),
            Err(error) => Err(format!(
                "firewalld could not be told to let containers through ({}); run: firewall-cmd --zone={ZONE} \
                 --change-interface={}",
                crate::chain(&error),
                needs.bridge
            )),
        };
        found.note(note);
    }
    found.problems.extend(strangers(&chains, &needs.bridge));
    found
}

impl Found {
    fn note(&mut self, result: Result<String, String>) {
        match result {
            Ok(open) => self.open.insert(open),
            Err(problem) => self.problems.insert(problem),
        };
    }
}

/// Takes everything back.
pub(super) async fn withdraw(bridge: &str) -> Vec<CommandError> {
    let mut found = Found::default();
    let chains = base_chains(&mut found).await;
    let mut errors = Vec::new();
    for program in iptables_programs(&chains, &mut found) {
        let removed = async {
            let listing = Listing::read(&program).await?;
            let lines = listing.ours(bridge).iter().map(|rule| rule.line("-D", "")).collect();
            change(&program, lines).await
        };
        errors.extend(removed.await.err());
    }
    if chains.iter().any(|chain| chain.table == FIREWALLD) && is_bound(bridge).await {
        errors.extend(
            firewall_cmd(&[format!("--zone={ZONE}"), format!("--remove-interface={bridge}")])
                .await
                .err(),
        );
    }
    errors
}

/// What is in the way of any instance on this host, for `ionian doctor`: looks, and changes nothing.
pub(crate) async fn look() -> Found {
    let mut found = Found::default();
    let chains = base_chains(&mut found).await;
    for program in iptables_programs(&chains, &mut found) {
        found.note(match Listing::read(&program).await {
            Ok(listing) if listing.filters("FORWARD") || listing.filters("INPUT") => Ok(format!(
                "{program} filters; the platform adds rules of its own to {}",
                listing.forward_chain()
            )),
            Ok(_) => Ok(format!("{program} accepts everything")),
            Err(error) => Err(format!("{program} cannot be read: {}", crate::chain(&error))),
        });
    }
    if chains.iter().any(|chain| chain.table == FIREWALLD) {
        found.note(if find_program("firewall-cmd").is_some() {
            Ok(format!("firewalld; the platform binds its bridge to the zone {ZONE}"))
        } else {
            Err(format!(
                "firewalld's rules are there and firewall-cmd is not; bind the interfaces ion* to the zone {ZONE}"
            ))
        });
    }
    found.problems.extend(strangers(&chains, "ion*"));
    found
}

/// A chain that packets come to by themselves.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Chain {
    family: String,
    table: String,
    name: String,
    #[serde(default)]
    hook: String,
    #[serde(default)]
    policy: String,
}

#[derive(Deserialize)]
struct Listed {
    nftables: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    chain: Option<Chain>,
}

async fn base_chains(found: &mut Found) -> Vec<Chain> {
    match command::run("nft", &["-j", "list", "chains"], Input::None).await {
        Ok(text) => parse_chains(&text),
        Err(error) => {
            found
                .problems
                .insert(format!("the host's firewall cannot be read: {}", crate::chain(&error)));
            Vec::new()
        }
    }
}

fn parse_chains(text: &str) -> Vec<Chain> {
    let listed: Option<Listed> = serde_json::from_str(text).ok();
    let items = listed.map(|listed| listed.nftables).unwrap_or_default();
    items
        .into_iter()
        .filter_map(|item| item.chain)
        .filter(|chain| !chain.hook.is_empty())
        .collect()
}

/// Tables that drop what they do not know, of tools that we do not know.
fn strangers(chains: &[Chain], bridge: &str) -> Vec<String> {
    chains
        .iter()
        .filter(|chain| chain.policy == "drop" && matches!(chain.hook.as_str(), "forward" | "input"))
        .filter(|chain| matches!(chain.family.as_str(), "ip" | "inet"))
        .filter(|chain| !is_iptables(chain) && chain.table != FIREWALLD)
        .map(|chain| {
            let Chain {
                family,
                table,
                name,
                hook,
                ..
            } = chain;
            let rules = match hook.as_str() {
                "forward" => {
                    format!("iifname \"{bridge}\" accept, and oifname \"{bridge}\" ct state established,related accept")
                }
                _ => format!("iifname \"{bridge}\" accept (our own table limits what containers reach of the host)"),
            };
            format!("the chain {name} of the table {family} {table} drops what it does not know; add to it: {rules}")
        })
        .collect()
}

fn is_iptables(chain: &Chain) -> bool {
    chain.family == "ip" && chain.table == "filter"
}

/// The forms of iptables that have rules here. None is run where it has none, since running it makes its tables.
fn iptables_programs(chains: &[Chain], found: &mut Found) -> Vec<String> {
    let by_nft = chains.iter().any(is_iptables);
    let by_legacy = fs::read_to_string("/proc/net/ip_tables_names")
        .is_ok_and(|names| names.lines().any(|name| name.trim() == "filter"));
    let mut programs = Vec::new();
    for (used, form) in [(by_nft, "iptables-nft"), (by_legacy, "iptables-legacy")] {
        if !used {
            continue;
        }
        match [form, "iptables"].into_iter().find(|name| find_program(name).is_some()) {
            Some(program) => programs.push(program.to_owned()),
            None => {
                found.problems.insert(format!(
                    "the host has rules of {form} and no such program; install iptables, so that containers can be let \
                     through"
                ));
            }
        }
    }
    programs.dedup();
    programs
}

/// A rule as `iptables -S` prints it: the chain, and the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    chain: String,
    words: Vec<String>,
    /// Of our comment, behind the instance.
    label: String,
}

impl Rule {
    fn line(&self, verb: &str, position: &str) -> String {
        format!("{verb} {}{position} {}", self.chain, self.words.join(" "))
    }
}

/// The filter table of one form of iptables.
#[derive(Debug)]
struct Listing {
    lines: Vec<String>,
}

impl Listing {
    async fn read(program: &str) -> Result<Self, CommandError> {
        let text = command::run(program, &["-w", LOCK_SECONDS, "-S"], Input::None).await?;
        Ok(Self {
            lines: text.lines().map(str::to_owned).collect(),
        })
    }

    /// Whether somebody else's rules or policy may drop packets of this chain.
    fn filters(&self, chain: &str) -> bool {
        let rules = format!("-A {chain} ");
        self.lines
            .iter()
            .any(|line| (line.starts_with(&rules) && !line.contains(COMMENT)) || line == &format!("-P {chain} DROP"))
    }

    /// Where rules for forwarded packets go: Docker leaves one chain to others, and goes through it first.
    fn forward_chain(&self) -> &'static str {
        if self.lines.iter().any(|line| line == "-N DOCKER-USER") {
            DOCKER_USER
        } else {
            "FORWARD"
        }
    }

    /// The rules that an instance has here.
    fn ours(&self, bridge: &str) -> Vec<Rule> {
        let prefix = comment(bridge, "");
        self.lines
            .iter()
            .filter_map(|line| {
                let mut words = line.split_whitespace().map(|word| word.trim_matches('"').to_owned());
                if words.next()? != "-A" {
                    return None;
                }
                let chain = words.next()?;
                let words: Vec<_> = words.collect();
                let label = words.iter().find_map(|word| word.strip_prefix(&prefix))?.to_owned();
                Some(Rule { chain, words, label })
            })
            .collect()
    }

    fn wanted(&self, needs: &Needs) -> Vec<Rule> {
        let Needs { bridge, gateway, ports } = needs;
        let mut rules = Vec::new();
        let mut add = |chain: &str, label: &str, text: String| {
            let comment = comment(bridge, label);
            let text = format!("{text} -m comment --comment {comment} -j ACCEPT");
            rules.push(Rule {
                chain: chain.to_owned(),
                words: text.split_whitespace().map(str::to_owned).collect(),
                label: label.to_owned(),
            });
        };
        if self.filters("FORWARD") {
            let chain = self.forward_chain();
            add(chain, "out", format!("-i {bridge} ! -o {bridge}"));
            let replies = format!("-o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED");
            add(chain, "back", replies);
        }
        if self.filters("INPUT") {
            let replies = format!("-i {bridge} -m conntrack --ctstate RELATED,ESTABLISHED");
            add("INPUT", "replies", replies);
            let mut port = |protocol: &str, port: u16| {
                let text = format!("-i {bridge} -d {gateway} -p {protocol} --dport {port}");
                add("INPUT", &format!("{gateway}-{protocol}-{port}"), text);
            };
            for number in &ports.tcp {
                port("tcp", *number);
            }
            if ports.relays_names {
                port("tcp", 53);
                port("udp", 53);
            }
        }
        rules
    }
}

/// `<bridge>` names the instance.
fn comment(bridge: &str, label: &str) -> String {
    format!("{COMMENT}{bridge}:{label}")
}

/// Returns the chain in which forwarded packets are let through, or none where nothing is filtered.
async fn admit_by_iptables(program: &str, needs: &Needs) -> Result<Option<String>, CommandError> {
    let listing = Listing::read(program).await?;
    let wanted = listing.wanted(needs);
    let present = listing.ours(&needs.bridge);
    let same = |a: &Rule, b: &Rule| a.chain == b.chain && a.label == b.label;
    let missing = |rule: &&Rule| !present.iter().any(|other| same(rule, other));
    let stale = |rule: &&Rule| !wanted.iter().any(|other| same(rule, other));
    let insert = wanted.iter().filter(missing).map(|rule| rule.line("-I", " 1"));
    let remove = present.iter().filter(stale).map(|rule| rule.line("-D", ""));
    change(program, insert.chain(remove).collect()).await?;
    Ok((!wanted.is_empty()).then(|| listing.forward_chain().to_owned()))
}

/// All at once, or nothing.
async fn change(program: &str, lines: Vec<String>) -> Result<(), CommandError> {
    if lines.is_empty() {
        return Ok(());
    }
    let script = format!("*filter\n{}\nCOMMIT\n", lines.join("\n"));
    let arguments = ["--noflush", "--wait", LOCK_SECONDS];
    command::run(&format!("{program}-restore"), &arguments, Input::Text(&script))
        .await
        .map(|_| ())
}

/// Returns the zone that the bridge is in. Not in firewalld's own files, so that nothing is left of it when the
/// host starts again without us.
async fn admit_by_firewalld(bridge: &str) -> Result<String, CommandError> {
    if !is_bound(bridge).await {
        firewall_cmd(&[format!("--zone={ZONE}"), format!("--change-interface={bridge}")]).await?;
        return Ok(ZONE.to_owned());
    }
    Ok("the one that it is bound to".to_owned())
}

/// Whether a zone of firewalld has the bridge. Its own program takes a second to tell, its rules some milliseconds.
async fn is_bound(bridge: &str) -> bool {
    let rules = command::run("nft", &["list", "table", "inet", FIREWALLD], Input::None).await;
    rules.is_ok_and(|rules| rules.contains(bridge))
}

async fn firewall_cmd(arguments: &[String]) -> Result<(), CommandError> {
    command::run("firewall-cmd", arguments, Input::None).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(text: &str) -> Listing {
        Listing {
            lines: text.lines().map(str::to_owned).collect(),
        }
    }

    fn needs() -> Needs {
        Needs {
            bridge: "ion1".to_owned(),
            gateway: Ipv4Addr::new(172, 29, 0, 1),
            ports: OpenPorts {
                tcp: [8801].into(),
                relays_names: false,
            },
        }
    }

    fn labels(rules: &[Rule]) -> Vec<String> {
        rules
            .iter()
            .map(|rule| format!("{}:{}", rule.chain, rule.label))
            .collect()
    }

    #[test]
    fn an_open_host_gets_no_rules() {
        let open = listing("-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT ACCEPT");
        assert!(open.wanted(&needs()).is_empty());
    }

    #[test]
    fn docker_has_a_chain_for_others() {
        let docker = listing(
            "-P INPUT ACCEPT\n-P FORWARD DROP\n-N DOCKER-USER\n-A FORWARD -j DOCKER-USER\n-A DOCKER-USER -j RETURN",
        );
        assert_eq!(
            labels(&docker.wanted(&needs())),
            ["DOCKER-USER:out", "DOCKER-USER:back"]
        );
    }

    #[test]
    fn what_denies_incoming_packets_is_told_of_the_port() {
        let ufw = listing("-P INPUT DROP\n-P FORWARD DROP\n-A INPUT -j ufw-before-input");
        let wanted = ufw.wanted(&needs());
        assert_eq!(
            labels(&wanted),
            [
                "FORWARD:out",
                "FORWARD:back",
                "INPUT:replies",
                "INPUT:172.29.0.1-tcp-8801"
            ]
        );
        assert_eq!(
            wanted[3].words.join(" "),
            "-i ion1 -d 172.29.0.1 -p tcp --dport 8801 -m comment --comment ionian-ion1:172.29.0.1-tcp-8801 -j ACCEPT"
        );
    }

    #[test]
    fn rules_of_this_instance_are_known_by_their_comment() {
        let text = "-P FORWARD DROP\n\
                    -A FORWARD -i ion1 ! -o ion1 -m comment --comment \"ionian-ion1:out\" -j ACCEPT\n\
                    -A FORWARD -i ion12 ! -o ion12 -m comment --comment ionian-ion12:out -j ACCEPT\n\
                    -A FORWARD -i eth0 -m comment --comment other -j DROP";
        assert_eq!(labels(&listing(text).ours("ion1")), ["FORWARD:out"]);
        assert!(listing(text).filters("FORWARD"));
    }

    #[test]
    fn chains_are_read_and_strangers_named() {
        let text = r#"{"nftables": [{"metainfo": {"version": "1"}},
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": "drop"}},
            {"chain": {"family": "inet", "table": "mine", "name": "through", "hook": "forward", "policy": "drop"}},
            {"chain": {"family": "inet", "table": "mine", "name": "helper"}},
            {"chain": {"family": "ip6", "table": "six", "name": "in", "hook": "input", "policy": "drop"}}]}"#;
        let chains = parse_chains(text);
        assert_eq!(chains.len(), 3);
        let problems = strangers(&chains, "ion1");
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("through of the table inet mine"), "{problems:?}");
        assert!(parse_chains("no JSON").is_empty());
    }
}
