//! Administrators: they deploy, stop apps, change autoscalers and stop containers.

use std::time::Duration;

use ionian_domain::container::{RuntimeKind, StopReason};
use ionian_domain::function::{Autoscaler, Batching, RetryPolicy};
use ionian_domain::outcome::OutcomeStatus;
use ionian_domain::{ContainerId, Outcome};

use super::{Action, Ask, Function, Server, World};
use crate::event::{Event, PoolSettings};
use crate::tests::ids::numbered;

impl World {
    pub(super) fn declare(&mut self) {
        let id = numbered(self.number());
        let is_web = self.random.percent(25);
        let slots = if self.random.percent(40) {
            1 + self.random.below(4)
        } else {
            1
        };
        let batching = (!is_web && self.random.percent(20)).then(|| Batching {
            max_size: 1 + self.random.below(4),
            wait: Duration::from_millis(u64::from(self.random.below(500))),
        });
        let max_retries = if self.random.percent(40) {
            self.random.below(3)
        } else {
            0
        };
        let settings = PoolSettings {
            app_id: numbered(1),
            definition_id: numbered(self.number()),
            is_web,
            autoscaler: self.autoscaler(),
            slots,
            target_slots: 1 + self.random.below(slots),
            batching,
            retry: RetryPolicy {
                max_retries,
                backoff_coefficient: 2.0,
                initial_delay: Duration::from_millis(u64::from(self.random.below(3)) * 700),
                max_delay: Duration::from_secs(5),
            },
            timeout: Duration::from_secs(3 + u64::from(self.random.below(10))),
            startup_timeout: Duration::from_secs(4 + u64::from(self.random.below(10))),
            single_use: !is_web && batching.is_none() && slots == 1 && self.random.percent(15),
            // Five of the largest minima and one more fit onto the first worker.
            cpu_millis: 100 + 50 * self.random.below(5),
            memory_mib: 256,
            runtime: self.runtime(),
        };
        let never_polls = is_web && self.random.percent(30);
        let is_broken = self.random.percent(10);
        self.functions.push(Function {
            id,
            settings,
            is_active: true,
            is_broken,
            never_polls,
            failures: (0, self.now),
        });
    }

    fn runtime(&mut self) -> RuntimeKind {
        if self.random.percent(30) {
            RuntimeKind::Gvisor
        } else {
            RuntimeKind::Runc
        }
    }

    pub(super) fn autoscaler(&mut self) -> Autoscaler {
        Autoscaler {
            min_containers: u32::from(self.random.percent(25)),
            max_containers: self.random.percent(50).then(|| 1 + self.random.below(3)),
            buffer_containers: u32::from(self.random.percent(15)),
            scaledown_window: Duration::from_millis(500 + 500 * u64::from(self.random.below(20))),
        }
    }

    pub(super) fn activation(&self, function: usize) -> Event {
        let function = &self.functions[function];
        Event::FunctionActivated {
            function_id: function.id,
            settings: function.settings.clone(),
        }
    }

    /// Somebody deploys, stops an app, or changes its autoscaler. It is in the database before the
    /// scheduler hears of it.
    pub(super) fn administrate(&mut self) {
        if self.server != Server::Up {
            return;
        }
        if self.random.percent(4) {
            // The server is told to end, and does so with what has not ended by then.
            self.after_ms(0, Action::Event(Event::ShuttingDown));
            let delay = u64::from(self.random.below(4_000));
            self.after_ms(delay, Action::Crash);
            return;
        }
        let function = self
            .random
            .below(u32::try_from(self.functions.len()).expect("some functions")) as usize;
        let event = match self.random.below(6) {
            0 | 1 => {
                let definition_id = numbered(self.number());
                let is_broken = self.random.percent(15);
                let timeout = Duration::from_secs(3 + u64::from(self.random.below(10)));
                let function = &mut self.functions[function];
                function.settings.definition_id = definition_id;
                function.settings.timeout = timeout;
                function.is_active = true;
                function.is_broken = is_broken;
                function.failures.0 = 0;
                None
            }
            2 => {
                self.functions[function].is_active = false;
                self.functions[function].failures.0 = 0;
                Some(Event::FunctionDeactivated {
                    function_id: self.functions[function].id,
                    reason: StopReason::AppStopped,
                    outcome: Outcome::decided(OutcomeStatus::Terminated, "the app was stopped"),
                })
            }
            3 | 4 => {
                let live: Vec<ContainerId> = self.containers.keys().copied().collect();
                let chosen = self.random.below(u32::try_from(live.len()).expect("few containers")) as usize;
                let graceful = self.random.percent(60);
                let reply = self.ask(Ask::Nobody);
                let container_id = live.get(chosen).copied().unwrap_or_else(|| numbered(0));
                Some(Event::ContainerStopRequested {
                    container_id,
                    graceful,
                    reply,
                })
            }
            _ => {
                let autoscaler = self.autoscaler();
                self.functions[function].settings.autoscaler = autoscaler.clone();
                let reply = self.ask(Ask::Nobody);
                Some(Event::AutoscalerUpdated {
                    function_id: self.functions[function].id,
                    autoscaler,
                    reply,
                })
            }
        };
        let event = event.unwrap_or_else(|| self.activation(function));
        self.after_ms(0, Action::Event(event));
    }
}
