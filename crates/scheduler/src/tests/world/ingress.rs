//! The ingress: holds slots on web containers, and tells of demand late but in order.

use std::collections::BTreeMap;

use ionian_domain::{ContainerId, FunctionId, Timestamp};

use super::{Action, World};
use crate::event::{Event, WebUse};

#[derive(Default)]
pub(super) struct Ingress {
    entries: BTreeMap<ContainerId, Entry>,
    waiting: u32,
    report_planned: bool,
    /// Messages in each direction do not overtake each other.
    last_news: Timestamp,
    last_report: Timestamp,
}

struct Entry {
    in_flight: u32,
    accepts: bool,
    last_active: Timestamp,
}

impl Ingress {
    pub(super) fn is_at_rest(&self) -> bool {
        self.waiting == 0 && self.entries.values().all(|entry| entry.in_flight == 0)
    }
}

#[derive(Clone, Copy)]
pub(super) enum IngressStep {
    Ready(ContainerId),
    Draining(ContainerId),
    Gone(ContainerId),
    StartFailed,
    Request,
    Done(ContainerId),
    Report,
}

impl World {
    pub(super) fn tell_ingress(&mut self, function_id: FunctionId, news: IngressStep) {
        let delay = u64::from(self.random.below(6));
        let ingress = self.ingress.entry(function_id).or_default();
        let at = ingress
            .last_news
            .max(self.now + std::time::Duration::from_millis(delay));
        ingress.last_news = at;
        let delay = at.since(self.now).as_micros().div_ceil(1_000);
        self.after_ms(
            u64::try_from(delay).expect("a short delay"),
            Action::Ingress(function_id, news),
        );
    }

    pub(super) fn ingress_step(&mut self, function_id: FunctionId, step: IngressStep) {
        let now = self.now;
        let slots = self.function_of(function_id).settings.slots;
        let ingress = self.ingress.entry(function_id).or_default();
        match step {
            IngressStep::Ready(id) => {
                ingress.entries.insert(
                    id,
                    Entry {
                        in_flight: 0,
                        accepts: true,
                        last_active: now,
                    },
                );
                self.serve(function_id, slots);
            }
            IngressStep::Draining(id) => {
                if let Some(entry) = ingress.entries.get_mut(&id) {
                    entry.accepts = false;
                }
                self.plan_report(function_id, 5);
            }
            IngressStep::Gone(id) => {
                ingress.entries.remove(&id);
                self.plan_report(function_id, 250);
            }
            IngressStep::StartFailed => {
                ingress.waiting = 0;
                self.plan_report(function_id, 5);
            }
            IngressStep::Request => {
                ingress.waiting += 1;
                self.serve(function_id, slots);
            }
            IngressStep::Done(id) => {
                if let Some(entry) = ingress.entries.get_mut(&id) {
                    entry.in_flight -= 1;
                    entry.last_active = now;
                }
                self.serve(function_id, slots);
            }
            IngressStep::Report => {
                ingress.report_planned = false;
                let containers = ingress
                    .entries
                    .iter()
                    .map(|(id, entry)| WebUse {
                        container_id: *id,
                        in_flight: entry.in_flight,
                        last_active: entry.last_active,
                    })
                    .collect();
                let queued = ingress.waiting;
                self.after_ms(
                    0,
                    Action::Event(Event::WebDemand {
                        function_id,
                        queued,
                        containers,
                    }),
                );
            }
        }
    }

    fn serve(&mut self, function_id: FunctionId, slots: u32) {
        let now = self.now;
        let mut granted = Vec::new();
        let ingress = self.ingress.entry(function_id).or_default();
        for (id, entry) in &mut ingress.entries {
            while ingress.waiting > 0 && entry.accepts && entry.in_flight < slots {
                ingress.waiting -= 1;
                entry.in_flight += 1;
                entry.last_active = now;
                granted.push(*id);
            }
        }
        let is_urgent = ingress.waiting > 0;
        for id in granted {
            let delay = 1 + u64::from(self.random.below(2_000));
            self.after_ms(delay, Action::Ingress(function_id, IngressStep::Done(id)));
        }
        self.plan_report(function_id, if is_urgent { 5 } else { 250 });
    }

    fn plan_report(&mut self, function_id: FunctionId, within: u32) {
        let delay = u64::from(self.random.below(within + 1));
        let ingress = self.ingress.entry(function_id).or_default();
        // An urgent report does not wait for a planned one: reports are whole, so two do no harm.
        if ingress.report_planned && within > 5 {
            return;
        }
        ingress.report_planned = true;
        let at = ingress
            .last_report
            .max(self.now + std::time::Duration::from_millis(delay));
        ingress.last_report = at;
        let delay = at.since(self.now).as_micros().div_ceil(1_000);
        self.after_ms(
            u64::try_from(delay).expect("a short delay"),
            Action::Ingress(function_id, IngressStep::Report),
        );
    }
}
