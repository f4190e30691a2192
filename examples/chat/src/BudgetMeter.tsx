import type { Behest, Budget } from "@behest/client-ts";
import { useCallback, useEffect, useState } from "react";

/** The budget that is nearest to its end, asked for again after each answer and every minute. */
export function useBudget(client: Behest): { budget: Budget | undefined; refresh: () => Promise<void> } {
  const [budget, setBudget] = useState<Budget>();
  const refresh = useCallback(async () => {
    try {
      const budgets = await client.budgets.list();
      setBudget(budgets.filter((found) => Number(found.limit) > 0).sort((a, b) => usedOf(b) - usedOf(a))[0]);
    } catch {
      // the meter keeps what it shows: the chat itself will say what is wrong
    }
  }, [client]);
  useEffect(() => {
    void refresh();
    const timer = setInterval(() => void refresh(), 60_000);
    return () => clearInterval(timer);
  }, [refresh]);
  return { budget, refresh };
}

export function usedOf(budget: Budget): number {
  return Math.min(1, Math.max(0, 1 - Number(budget.remaining) / Number(budget.limit)));
}

/** An amount of a budget's unit, as people read it. */
export function amountText(amount: string | number, unit: string): string {
  const value = Number(amount);
  if (unit.toLowerCase() !== "usd") return `${Math.max(0, value).toLocaleString("en")} ${unit.replaceAll("_", " ")}`;
  const digits = value >= 0.00005 && value < 0.1 ? 4 : 2;
  return `$${Math.max(0, value).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })}`;
}

export function BudgetMeter({ budget }: { budget: Budget | undefined }) {
  if (!budget) return <div className="budget" data-testid="budget" />;
  const used = usedOf(budget);
  const level = used >= 0.95 ? "empty" : used >= 0.75 ? "low" : "fine";
  const left = amountText(budget.remaining, budget.unit);
  const text = `${left} of ${amountText(budget.limit, budget.unit)} left`;
  const resets = budget.resets_at ? `, renewed ${new Date(budget.resets_at).toLocaleString()}` : "";
  return (
    <div className={`budget ${level}`} data-testid="budget" title={text + resets}>
      <span className="budget-text">
        <strong>{left}</strong> left
      </span>
      <div className="meter" role="meter" aria-label="Budget left" aria-valuemin={0} aria-valuemax={100} aria-valuenow={Math.round((1 - used) * 100)} aria-valuetext={text}>
        <div className="meter-left" style={{ inlineSize: `${(1 - used) * 100}%` }} />
      </div>
    </div>
  );
}
